"""Triton kernels run in Triton's interpreter here. It is asked for before anything imports Triton, as the
compiler of torch does: what is defined before stays for a device.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
