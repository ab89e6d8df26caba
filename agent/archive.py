"""Folders of the host as one archive, for sandboxes that cannot see them.

    size = measure([folder, file], most)                  bytes that they take, each file in whole blocks
    pack([folder, file], archive)                         0/... and 1, a gzipped tar in an open file
    python3 -c UNPACK PLACE < 8 bytes of length + tar     in the sandbox; leaves with 0 if all of it has come

Kept: content, permissions (0o777 of the mode) and times, so that compiled Python files stay valid. A link stays a link
and is followed nowhere, neither here nor there: it leads to what has its target's name inside. A file with several
names is copied for each. Owners are lost: all belongs to who unpacks it. Devices, pipes and sockets are refused.
"""

import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from agent.sandbox import SandboxError

BLOCK = 4096
MOST_FILES = 300_000

# Trusted, because the host made it from folders: with no filter, so that modes and links stay what they are.
UNPACK = """import os,sys,tarfile
class Given:
    def __init__(self):
        self.left=8
        self.left=int.from_bytes(self.read(8),"big")
    def read(self,size):
        data=b""
        size=min(size,self.left)
        while len(data)<size:
            more=os.read(0,size-len(data))
            if not more:
                raise EOFError("the archive is cut off")
            data+=more
        self.left-=len(data)
        return data
given=Given()
options={"filter":"fully_trusted"} if hasattr(tarfile,"fully_trusted_filter") else {}
with tarfile.open(fileobj=given,mode="r|gz") as archive:
    archive.extractall(sys.argv[1],**options)
while given.left:
    given.read(1<<20)"""


def measure(places: Sequence[Path], most: int) -> int:
    """Bytes of all of them. Raises SandboxError if they are more than `most`, or too many files."""
    total = count = 0
    for top in places:
        for _, _, found in _below(top):
            count += 1
            total += BLOCK + -(-found.st_size // BLOCK) * BLOCK if stat.S_ISREG(found.st_mode) else BLOCK
            if total > most or count > MOST_FILES:
                raise SandboxError(
                    f"{top} is too large to be copied into a sandbox: more than {most // 2**20} MB or "
                    f"{MOST_FILES} files with what is given beside it"
                )
    return total


def pack(places: Sequence[Path], into: IO[bytes]) -> None:
    """Writes the archive. Raises SandboxError for what cannot be copied."""
    try:
        with tarfile.open(fileobj=into, mode="w:gz", compresslevel=1, format=tarfile.PAX_FORMAT) as archive:
            for number, top in enumerate(places):
                for inside, at, found in _below(top):
                    _add(archive, f"{number}/{inside}" if inside else str(number), at, found)
    except SandboxError:
        raise
    except OSError as error:
        raise SandboxError(f"{error.filename or 'a file'} cannot be copied into a sandbox: {error}") from None


At = tuple[str, int | None]  # a name and the folder, open, that it is in


def _below(top: Path) -> Iterator[tuple[str, At, os.stat_result]]:
    """Path inside, where it is, and what it is: all that is below a place, itself first."""

    def give_up(error: OSError) -> None:
        raise SandboxError(f"{error.filename} cannot be copied into a sandbox: {error.strerror}")

    try:
        whole = os.path.realpath(top)
        yield "", (whole, None), os.stat(whole)
        if not os.path.isdir(whole):
            return
        for folder, folders, names, fd in os.fwalk(whole, onerror=give_up):
            folders.sort()
            for name in sorted([*folders, *names]):
                inside = os.path.relpath(os.path.join(folder, name), whole)
                yield inside, (name, fd), os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        if isinstance(error, SandboxError):
            raise
        give_up(error)


def _add(archive: tarfile.TarFile, inside: str, at: At, found: os.stat_result) -> None:
    name, folder = at
    entry = tarfile.TarInfo(inside)
    entry.mode, entry.mtime = found.st_mode & 0o777, int(found.st_mtime)
    if stat.S_ISDIR(found.st_mode):
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
    elif stat.S_ISLNK(found.st_mode):
        entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=folder)
        archive.addfile(entry)
    elif stat.S_ISREG(found.st_mode):
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        with open(fd, "rb") as file:
            entry.size = os.fstat(fd).st_size
            archive.addfile(entry, file)
    else:
        raise SandboxError(f"{name} ({inside}) cannot be copied into a sandbox: it is a device, a pipe or a socket")
