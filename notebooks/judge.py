"""Judge answers to the exercises of one notebook. `grade.py` starts this in a process of its own for each notebook.

Three processes take part. The *course's* process runs the course's own cells, once. For each answer it makes a copy of itself, the
*judge*, which makes another, the *student's*. The student's process is shut in by `sandbox`, runs the answer's cell, and from then
on only answers calls: the check runs in the judge, which sends arguments and gets values back. So an answer that overwrites the
check, NumPy or Python itself does so in its own process. The judge learns the secret seed after the student's process was made.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import inspect
import io
import json
import os
import pickle
import re
import select
import signal
import struct
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import sandbox
import torch
import traitlets

import medseg_lite
from medseg_lite import paths
from medseg_lite.volume import Case

LARGEST_MESSAGE = 1 << 30
LARGEST_REASON = 500
NAMES = {
    "builtins": {
        "set",
        "frozenset",
        "range",
        "slice",
        "complex",
        "bytearray",
        "dict",
        "list",
        "tuple",
        "int",
        "float",
        "bool",
        "str",
    },
    "collections": {"OrderedDict", "defaultdict"},
    "torch": {"Size", "device"},
    "judge": {"_tensor"},
}
NUMPY = {"ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer"}


# ----------------------------------------------------------------------------------------------------- what is sent


def _tensor(array: np.ndarray, is_parameter: bool, requires_grad: bool) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)


class Pickler(pickle.Pickler):
    """A pickler that sends tensors as arrays, because PyTorch's own way could run any code where they arrive."""

    def reducer_override(self, value: object) -> object:
        if isinstance(value, torch.Tensor):
            array = np.array(value.detach().cpu().numpy(), order="C")
            return _tensor, (array, isinstance(value, torch.nn.Parameter), value.requires_grad)
        return NotImplemented


class Unpickler(pickle.Unpickler):
    """An unpickler for what a student's process sends: numbers, texts, arrays, tensors, cases, networks and optimisers."""

    def find_class(self, module: str, name: str) -> object:
        found = getattr(sys.modules.get(module), name, None)
        allowed = name in NAMES.get(module, ()) or (module.partition(".")[0] == "numpy" and name in NUMPY)
        if isinstance(found, torch.dtype) or (found is not None and allowed):
            return found
        if isinstance(found, type) and issubclass(found, (torch.nn.Module, torch.optim.Optimizer, Case)):
            return found
        if isinstance(found, type) and module.partition(".")[0] == "numpy" and issubclass(found, (np.dtype, np.generic)):
            return found
        raise TypeError(f"the answer holds a {name}, which the check cannot take; give plain numbers, arrays or tensors")


class Line:
    """One end of a line between judge and student: whole messages, one after the other."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write = read, write

    def send(self, *message: object) -> None:
        packed = io.BytesIO()
        Pickler(packed, protocol=5).dump(message)
        _send(self.write, packed.getvalue())

    def receive(self, unpickler: type = Unpickler) -> tuple:
        return unpickler(io.BytesIO(_receive(self.read))).load()


def _send(write: int, data: bytes) -> None:
    view = memoryview(struct.pack("Q", len(data)) + data)
    while view:
        view = view[os.write(write, view) :]


def _receive(read: int) -> bytes:
    """Return the next message. An empty one stands for the end."""

    def exactly(count: int) -> bytes:
        parts = []
        while count and (part := os.read(read, min(count, 1 << 20))):
            parts.append(part)
            count -= len(part)
        if count:
            raise EOFError
        return b"".join(parts)

    size = struct.unpack("Q", exactly(8))[0]
    if size > LARGEST_MESSAGE:
        raise ValueError(f"the answer has {size / 1e9:.1f} GB, more than the check takes")
    return exactly(size)


# ------------------------------------------------------------------------------------------------- the student's process


def run(source: str, namespace: dict, check: str) -> None:
    """Run an exercise's cell without the statements that call its check."""

    class Stripped(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            value = getattr(node, "value", getattr(node, "test", None))
            called = value.func if isinstance(value, ast.Call) else None
            mine = isinstance(called, ast.Name) and called.id == check and isinstance(node, (ast.Expr, ast.Assign, ast.Assert))
            return ast.copy_location(ast.Pass(), node) if mine else self.generic_visit(node)

    tree = ast.parse(re.sub(r"^[%!].*", "", source, flags=re.MULTILINE))
    exec(compile(Stripped().visit(tree), "<the answer>", "exec"), namespace)


def describe(value: object) -> tuple[str, object]:
    """Return how a value goes to the judge: a function stays here, a widget sends what it shows, all else goes as it is."""
    if isinstance(value, traitlets.HasTraits):
        plain = (str, int, float, bool, tuple, list)
        names = [n for n in value.trait_names() if not n.startswith("_") and isinstance(getattr(value, n, None), plain)]
        return "widget", {name: getattr(value, name) for name in names}
    if callable(value) and not isinstance(value, torch.nn.Module):
        return "function", None
    return "value", value


def answer_calls(line: Line, functions: list) -> None:
    """Answer the judge's calls until it hangs up. It may also ask for the gradient of the last call."""
    leaves, value = [], None
    while True:
        kind, *rest = line.receive(pickle.Unpickler)
        try:
            if kind == "gradient":
                found = torch.autograd.grad(value, leaves, rest[0], allow_unused=True, retain_graph=True)
                line.send("value", found)
                continue
            number, arguments, options, state = rest
            torch.set_rng_state(state)
            leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
            value = functions[number](*arguments, **options)
            line.send("value", value)
        except Exception as error:
            line.send("error", type(error).__name__, str(error)[:LARGEST_REASON])


def be_student(namespace: dict, exercise: dict, source: str, line: Line, folder: Path, limits: dict) -> None:
    """Run an answer and then answer calls, shut in. Never returns."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        keep = sorted({0, 1, 2, line.read, line.write})
        for low, high in zip(keep, [*keep[1:], 1 << 16]):
            os.closerange(low + 1, high)
        os.chdir(folder)
        os.environ.update({name: str(folder) for name in ("HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP")})
        tempfile.tempdir = None
        readable = [Path(medseg_lite.__file__).parent, paths.shipped()]
        sandbox.close_in(folder, readable, memory=limits["memory"], seconds=limits["seconds"])
        namespace[exercise["check"]] = lambda *answers, **options: True
        run(exercise["starter"], namespace, exercise["check"])  # an answer may stand in a cell of its own below the starter
        run(source, namespace, exercise["check"])
        values = [eval(argument, namespace) for argument in exercise["arguments"]]
        line.send("answer", [describe(value) for value in values])
        answer_calls(line, values)
    except EOFError:
        pass
    except BaseException as error:
        with contextlib.suppress(BaseException):
            line.send("error", type(error).__name__, str(error)[:LARGEST_REASON])
    finally:
        os._exit(0)


# ------------------------------------------------------------------------------------------------------ the judge


class Missed(Exception):
    """An answer that the check need not see: the message says why."""


def raised(name: str, text: str) -> Exception:
    """Return the exception that a student's process reports, so that checks can expect it; unknown kinds become a `Missed`."""
    kind = getattr(builtins, name, None)
    plain = isinstance(kind, type) and issubclass(kind, (ArithmeticError, LookupError, ValueError, TypeError))
    if plain and not issubclass(kind, UnicodeError):
        return kind(text)
    return Missed(f"{name}: {text}" if text else name)


def proxy(line: Line, number: int):
    """Return a function that has its body in the student's process. Gradients flow through it."""

    def ask(*message: object) -> object:
        line.send(*message)
        kind, *rest = line.receive()
        if kind == "error":
            raise raised(*map(str, rest))
        return rest[0]

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(context, arguments, *leaves):
            return ask("call", number, arguments, {}, torch.get_rng_state()).detach()

        @staticmethod
        def backward(context, gradient):
            return None, *ask("gradient", gradient)

    def call(*arguments: object, **options: object) -> object:
        leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        if leaves and not options and torch.is_grad_enabled():
            return Call.apply(arguments, *leaves)
        return ask("call", number, arguments, options, torch.get_rng_state())

    return call


def received(line: Line, namespace: dict, exercise: dict) -> list:
    """Return what the check is called with: values from the student's process, and functions that live there."""
    kind, *rest = line.receive()
    if kind != "answer":
        raise raised(*map(str, rest))
    answers = []
    for number, (argument, (how, value)) in enumerate(zip(exercise["arguments"], rest[0], strict=True)):
        if how == "widget":
            run(exercise["starter"], namespace, exercise["check"])
            widget = eval(argument, namespace)
            for name, shown in [*value.items()] * 2:  # twice, because one trait may set another back
                if widget.has_trait(name) and getattr(widget, name) != shown:
                    setattr(widget, name, shown)
            value = widget
        answers.append(proxy(line, number) if how == "function" else value)
    return answers


def verdict(line: Line, student: int, namespace: dict, exercise: dict, seed: int, limits: dict) -> tuple[bool, str]:
    """Return whether an answer passes its check with a secret seed, and the reason."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            answers, check = received(line, namespace, exercise), namespace[exercise["check"]]
            options = {"seed": seed} if "seed" in inspect.signature(check).parameters else {}
            found = bool(check(*answers, **options))
        return found, printed.getvalue()
    except (EOFError, BrokenPipeError, ConnectionError):
        status = os.waitpid(student, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            return False, f"took more than {limits['seconds']} s of processor time"
        if os.WIFSIGNALED(status):
            return False, f"the answer's process was ended by {signal.Signals(os.WTERMSIG(status)).name}"
        return False, "the answer left Python before the check was done"
    except Missed as error:
        return False, str(error)
    except Exception as error:
        return False, f"{printed.getvalue()} {type(error).__name__}: {error}"


def be_judge(namespace: dict, exercise: dict, tasks: int, out: int, folder: Path, limits: dict) -> None:
    """Read an answer, have it run by a student's process, read the seed, and send the verdict. Never returns."""
    try:
        source = _receive(tasks).decode()
        (there, here), (back, forth) = os.pipe(), os.pipe()
        student = os.fork()
        if student == 0:
            be_student(namespace, exercise, source, Line(there, forth), folder, limits)
        os.close(there)
        os.close(forth)
        _send(out, str(student).encode())
        seed = int(_receive(tasks))
        passed, reason = verdict(Line(back, here), student, namespace, exercise, seed, limits)
        with contextlib.suppress(ProcessLookupError):
            os.kill(student, signal.SIGKILL)
        _send(out, json.dumps([passed, reason]).encode())
    except BaseException as error:
        with contextlib.suppress(BaseException):
            _send(out, json.dumps([False, f"the check broke off: {type(error).__name__}: {error}"]).encode())
    finally:
        os._exit(0)


# ----------------------------------------------------------------------------------------------- the course's process


def judge(namespace: dict, exercise: dict, tasks: int, limits: dict) -> tuple[bool, str]:
    """Return the verdict on the next answer, in a process that is killed when its time is up."""
    back, out = os.pipe()
    with tempfile.TemporaryDirectory(prefix="medseg-grade-", ignore_cleanup_errors=True) as folder:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.close(back)
            be_judge(namespace, exercise, tasks, out, Path(os.path.realpath(folder)), limits)
        os.close(out)
        deadline, family = time.monotonic() + limits["seconds"], [child]

        def message() -> bytes:
            if not select.select([back], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            return _receive(back)

        try:
            family.append(int(message()))
            return tuple(json.loads(message()))
        except TimeoutError:
            return False, f"took longer than {limits['seconds']} s"
        except EOFError:
            return False, "the check ended before it had a verdict"
        finally:
            os.close(back)
            for process in family:
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


def serve(plan: dict, tasks: int, report: io.TextIOBase) -> None:
    """Run the course's cells, and judge the answers to each exercise where it stands.

    Args:
        plan: `cells`, the course's code cells in their order without solutions: `source`, and `exercise` where it is one. An
            exercise has `name`, `check`, `arguments`, `starter` and `answers`, the number of answers to it. `limits`: `seconds`
            and `memory` in bytes for each answer.
        tasks: file of the answers and seeds, in the order in which they are judged.
        report: stream of the verdicts, a JSON text in each line.
    """
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    namespace = vars(module)
    with contextlib.suppress(ImportError):
        from IPython.display import display

        namespace["display"] = display
    torch.set_num_threads(1)
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(x * 2, x, torch.ones(1))  # loads what PyTorch loads with its first gradient, once for all answers
    left = sum(cell["exercise"]["answers"] for cell in plan["cells"] if cell.get("exercise"))
    for number, cell in enumerate(plan["cells"]):
        exercise = cell.get("exercise")
        if exercise and exercise["answers"]:
            gc.collect()
            gc.freeze()  # the copies share memory, until a collection writes to it
        for _ in range(exercise["answers"] if exercise else 0):
            passed, reason = judge(namespace, exercise, tasks, plan["limits"])
            reason = " ".join(reason.split())[:LARGEST_REASON]
            print(json.dumps({"exercise": exercise["name"], "passed": passed, "reason": reason}), file=report, flush=True)
            left -= 1
        if not left:
            break
        try:
            run(cell["source"], namespace, exercise["check"] if exercise else "")
        except Exception as error:
            text = f"the course's own code cell {number + 1} fails here: {type(error).__name__}: {error}"
            print(json.dumps({"error": text}), file=report, flush=True)
            break


def main() -> None:
    """Serve one notebook: the plan is the first message of the file of tasks, verdicts go to what was standard output."""
    tasks = int(sys.argv[-1])
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
    sys.stderr = open(os.devnull, "w", encoding="utf-8")
    serve(json.loads(_receive(tasks)), tasks, report)
