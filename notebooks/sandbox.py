"""Walls around code that nobody has read: limits, no files but its own folder, no network. `grade.py` uses them.

On Linux the kernel builds the walls: Landlock (Linux 5.13) for files, a seccomp filter for system calls, and resource limits. On
other systems Python's audit hook stands alone. It stops accidents and simple malice, but not somebody who knows how to get past it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
import sys
import sysconfig
from pathlib import Path

# System calls that are refused, with their numbers on x86_64 and on aarch64 (-: that machine has no such call).
REFUSED = """
    fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, kill 62 129, tkill 200 130, pidfd_open 434 434,
    pidfd_send_signal 424 424, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, ptrace 101 117, process_vm_readv 310 270,
    process_vm_writev 311 271, socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, io_uring_setup 425 425,
    bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, unshare 272 97, setns 308 268, mount 165 40, umount2 166 39,
    pivot_root 155 41, move_mount 429 429, open_tree 428 428, fsopen 430 430, mount_setattr 442 442, chroot 161 51,
    open_by_handle_at 304 265, chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, fchown 93 55,
    lchown 94 -, fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5,
    lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, setrlimit 160 164,
    setpriority 141 140, sched_setaffinity 203 122, sched_setscheduler 144 119, add_key 248 217, keyctl 250 219,
    request_key 249 218, shmget 29 194, msgget 68 186, semget 64 190, mq_open 240 180, memfd_create 319 279, setsid 112 157,
    setpgid 109 154, personality 135 92, tgkill 234 131
"""
CLONE, CLONE3, PRLIMIT64 = (56, 220), (435, 435), (302, 261)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
EPERM, ENOSYS, CLONE_THREAD = 1, 38, 0x10000
# Landlock's rights, by the version of the kernel's interface that brought them.
WRITES = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))  # write, remove, make
READS = sum(1 << bit for bit in (0, 2, 3))  # execute, read a file, read a folder


class Walls:
    """What keeps a process in: words for the reader of the grades.

    Attributes:
        files: True if the kernel refuses files outside the allowed folders.
        calls: True if the kernel refuses processes, network and signals.
    """

    def __init__(self) -> None:
        self.files = sys.platform == "linux" and _landlock_version() > 0
        self.calls = sys.platform == "linux" and platform.machine() in ARCHITECTURES and _has_seccomp()

    def __str__(self) -> str:
        kernel = {"files outside its folder": self.files, "network, processes and signals": self.calls}
        by = [
            f"{what}: refused by {'the kernel' if held else 'Python alone, which can be got past'}"
            for what, held in kernel.items()
        ]
        return "; ".join(by)


def close_in(folder: Path, readable: list[Path], *, memory: int, seconds: int, file_size: int = 64 << 20) -> None:
    """Shut this process in, for good.

    Args:
        folder: the only folder that it can write to.
        readable: folders and files that it can read beside the standard ones of Python and the system.
        memory: bytes that it may take beyond what it has now.
        seconds: processor time that it may use.
        file_size: bytes of the largest file that it may write.
    """
    walls = Walls()
    _limit(memory, seconds, file_size)
    system = [Path(p) for p in ("/usr", "/lib", "/lib64", "/bin", "/opt", "/etc", "/dev/null", "/dev/zero", "/dev/urandom")]
    python = [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    readable = [*readable, *python, Path(sys.prefix), Path(sys.base_prefix), Path("/proc/cpuinfo"), Path("/proc/meminfo")]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        if walls.files:
            _restrict_files(libc, folder, [*readable, *system])
        _drop_capabilities(libc)
        if walls.calls:
            _restrict_calls(libc)
    _watch(folder)


def _limit(memory: int, seconds: int, file_size: int) -> None:
    """Set limits of memory, time, size of a file, open files and core dumps; and of processes, for all users but root."""
    limits = {"CPU": seconds, "FSIZE": file_size, "NOFILE": 128, "CORE": 0, "NPROC": 0}
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
        limits["AS"] = pages * resource.getpagesize() + memory
    for name, value in limits.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # macOS knows fewer
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def _syscall(libc: ctypes.CDLL, *arguments: object) -> int:
    return libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))


def _landlock_version() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return _syscall(libc, 444, None, 0, 1)


def _has_seccomp() -> bool:
    return ctypes.CDLL(None).prctl(21, 0, 0, 0, 0) >= 0  # PR_GET_SECCOMP


def _restrict_files(libc: ctypes.CDLL, folder: Path, readable: list[Path]) -> None:
    """Let the kernel refuse every file but these: Landlock."""
    version, rights, writes = _landlock_version(), READS | WRITES, WRITES
    for bit, since in ((13, 2), (14, 3), (15, 5)):  # move, truncate, ioctl of a device
        if version >= since:
            rights, writes = rights | 1 << bit, writes | 1 << bit
    network = 3 if version >= 4 else 0  # bind and connect with TCP
    scope = 3 if version >= 6 else 0  # abstract sockets and signals
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _syscall(libc, 444, struct.pack("QQQ", rights, network, scope), size, 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "Landlock refuses to make rules; grade on another machine")
    for path, allowed in [*((p, READS) for p in readable), (folder, READS | writes)]:
        with contextlib.suppress(FileNotFoundError):
            at = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not Path(path).is_dir():
                allowed &= 1 << 0 | 1 << 1 | 1 << 2 | (1 << 14 & rights)
            failed = _syscall(libc, 445, ruleset, 1, struct.pack("=Qi", allowed, at), 0)
            os.close(at)
            if failed:
                raise OSError(ctypes.get_errno(), f"Landlock refuses a rule for {path}")
    if _syscall(libc, 446, ruleset, 0):
        raise OSError(ctypes.get_errno(), "Landlock refuses to close; grade on another machine")
    os.close(ruleset)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Give up what a process of root may do beyond others."""
    libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))


def _restrict_calls(libc: ctypes.CDLL) -> None:
    """Let the kernel refuse processes, network, signals to others, and changes of a file's owner, rights and times: seccomp."""
    column, audit = ARCHITECTURES[platform.machine()]

    def answer(errno: int) -> tuple[int, int, int, int]:
        return 0x06, 0, 0, 0x00050000 | errno  # return SECCOMP_RET_ERRNO

    allow, load, equal, higher, any_bit = (0x06, 0, 0, 0x7FFF0000), 0x20, 0x15, 0x35, 0x45
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (0x06, 0, 0, 0x80000000), (load, 0, 0, 0)]  # another architecture: killed
    if column == 0:
        program += [(higher, 0, 1, 0x40000000), answer(EPERM)]  # the x32 calls
    for _name, *numbers in (entry.split() for entry in REFUSED.split(",")):
        if numbers[column] != "-":
            program += [(equal, 0, 1, int(numbers[column])), answer(EPERM)]
    program += [(equal, 0, 1, CLONE3[column]), answer(ENOSYS)]  # the C library then asks for clone
    program += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD), answer(EPERM), allow]
    # prlimit64 may ask, but not set: its third argument, a pointer, must be 0.
    program += [
        (equal, 0, 5, PRLIMIT64[column]),
        (load, 0, 0, 32),
        (equal, 0, 2, 0),
        (load, 0, 0, 36),
        (equal, 1, 0, 0),
        answer(EPERM),
    ]
    program += [allow]
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filter_ = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(packed))
    if libc.prctl(22, 2, filter_, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp refuses its filter; grade on another machine")


ONE_PATH = "remove rmdir mkdir chmod chown truncate utime setxattr removexattr".split()
TWO_PATHS = "rename link symlink".split()
FORBIDDEN = (
    *("subprocess.", "socket.", "ftplib.", "smtplib.", "urllib.", "http.", "pty.", "sys._current_frames"),
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "os.kill", "os.startfile", "signal.pthread_kill"),
)


def _watch(folder: Path) -> None:
    """Let Python refuse what the kernel may not: files outside `folder`, processes, network. The hook cannot be taken out again."""
    root = os.path.realpath(folder) + os.sep

    def outside(path: object) -> bool:
        if isinstance(path, int) or path is None:
            return False
        return not (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(root)

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is not allowed in an exercise")
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and outside(path) and path != os.devnull:
                raise PermissionError(f"writing to {os.fsdecode(path)} is not allowed in an exercise")
        elif event.removeprefix("os.") in (*ONE_PATH, *TWO_PATHS):
            for path in arguments[: 1 if event.removeprefix("os.") in ONE_PATH else 2]:
                if outside(path):
                    raise PermissionError(f"{event} of {os.fsdecode(path)} is not allowed in an exercise")

    sys.addaudithook(hook)
