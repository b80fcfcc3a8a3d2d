"""Rayfold: a distributed training runtime on Ray. Import from its folders, e.g. `rayfold.runtime.config`."""
