"""A system call filter as the kernel reads it: what no program under test needs, and much of the kernel behind it.

program(machine, network, owner)  ->  bytes, one classic BPF instruction after another

another architecture's numbers                 the process is killed
clone with a new namespace                     EPERM
clone3 (its flags cannot be read by a filter)  ENOSYS: the C library then uses clone
ioctl TIOCSTI (typing into a terminal)         EPERM
socket of another family than unix             EACCES; with `network` also IPv4 and IPv6
DENIED                                         EPERM
OWNER, where files outside belong to the same  EPERM: Landlock does not cover mode, owner, times and attributes,
user (no namespaces)                           nor connecting to a socket that has a path
"""

import struct

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
TIOCSTI = 0x5412
EPERM, EACCES, ENOSYS = 1, 13, 38
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10

# name: numbers on x86_64 and aarch64 (None: not there). include/uapi/asm-generic/unistd.h, arch/x86/entry/syscalls
CALLED = {"clone": (56, 220), "clone3": (435, 435), "ioctl": (16, 29), "socket": (41, 198)}
DENIED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "process_madvise": (440, 440),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "memfd_secret": (447, 447),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
}
OWNER: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "connect": (42, 203),
}

_LOAD, _EQUAL, _ANY, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_NUMBER, _ARCH, _FIRST = 0, 4, 16  # offsets in struct seccomp_data
_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def program(machine: str, network: bool = False, owner: bool = False) -> bytes:
    """The filter for one kind of machine. Raises ValueError for one whose call numbers are not known here."""
    if machine not in AUDIT_ARCH:
        raise ValueError(f"no system call numbers for {machine}; known: {', '.join(AUDIT_ARCH)}")
    which = list(AUDIT_ARCH).index(machine)
    number = {name: numbers[which] for name, numbers in CALLED.items()}
    code: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":  # x32: the same calls under other numbers
        code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, ERRNO | ENOSYS)]
    code += [(_EQUAL, 0, 1, number["clone3"]), (_RETURN, 0, 0, ERRNO | ENOSYS)]
    for name, test, operand in (("clone", _ANY, NEW_NAMESPACES), ("ioctl", _EQUAL, TIOCSTI)):
        offset = _FIRST if name == "clone" else _FIRST + 8
        block = [(_LOAD, 0, 0, offset), (test, 0, 1, operand), (_RETURN, 0, 0, ERRNO | EPERM), (_RETURN, 0, 0, ALLOW)]
        code += [(_EQUAL, 0, len(block), number[name]), *block]
    families = (AF_UNIX, *((AF_INET, AF_INET6) if network else ())) if not owner else ()
    block = [(_LOAD, 0, 0, _FIRST)]
    block += [(_EQUAL, len(families) - at, 0, family) for at, family in enumerate(families)]
    block += [(_RETURN, 0, 0, ERRNO | EACCES), (_RETURN, 0, 0, ALLOW)]
    code += [(_EQUAL, 0, len(block), number["socket"]), *block]
    for numbers in (*DENIED.values(), *(OWNER.values() if owner else ())):
        if numbers[which] is not None:
            code += [(_EQUAL, 0, 1, numbers[which] or 0), (_RETURN, 0, 0, ERRNO | EPERM)]
    code.append((_RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
