"""Where the command stood: what its relative paths and module names mean, for every process of a run."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """The command's working directory, and the folders in which a user's own modules are looked for."""

    folder: str
    module_folders: tuple[str, ...]
    sabotaged: bool = False  # whether a chaos campaign has its faults done inside of workers (`saboteur.py`)

    @classmethod
    def of_command(cls, config: Path) -> "Home":
        """The home of a command that was given the file `config`."""
        here = os.getcwd()
        return cls(here, (str(config.resolve().parent), here))

    def enter(self) -> None:
        """Make this process stand there too; where a machine has no such folder, only absolute paths work."""
        sys.path[:0] = [folder for folder in self.module_folders if folder not in sys.path]
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
