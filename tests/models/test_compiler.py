"""The process that compiles kernels: it answers, ends, fails and is interrupted without its parent taking harm."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longverse.models import kernels

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(bool(kernels.unavailable()), reason=kernels.unavailable() or "kernels are off")


STEP = 1  # bound to 2 below


def small_kernel() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A kernel's maker and the types it is called with."""
    from longverse.models.kernels.build import CacheForm, chunk_kernel

    maker = (CacheForm(16, 1, "f32"), "f32", "choose_blocks")
    weights, share = np.empty((1, 5, 3), dtype=np.float32), np.empty((1, 1))
    args = (
        0, 1, np.zeros(1, dtype=np.int64), 64, 0.9, 4, 5, weights, weights, np.empty((1, 1, 1), dtype=np.uint8), share,
    )  # fmt: skip
    return ("chunk_kernel", *maker), tuple(chunk_kernel(*maker).function.typeof_pyval(value) for value in args)


def kept(folder: Path) -> int:
    return len(list(folder.rglob("*.nbc")))


def test_one_child_for_all_and_another_when_it_is_gone(tmp_path: Path) -> None:
    from longverse.models.kernels.compiler import Compiler

    compiler = Compiler()
    maker, types = small_kernel()
    for folder in ("one", "two"):  # a child serves one folder
        compiler.compile(maker, types, str(tmp_path / folder))
        assert kept(tmp_path / folder) == 1
    child = compiler._child
    assert child is not None
    compiler.compile(maker, types, str(tmp_path / "two"))
    assert compiler._child is child
    child.kill()
    child.wait()
    for code in (tmp_path / "two").rglob("*.nb?"):
        code.unlink()
    compiler.compile(maker, types, str(tmp_path / "two"))
    assert compiler._child is not child
    assert kept(tmp_path / "two") == 1
    compiler._end()
    assert compiler._child is None


def test_what_fails_leaves_nothing_and_raises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longverse.models.kernels.compiler import Compiler

    compiler = Compiler()
    maker, types = small_kernel()
    compiler.compile(("no_such_kernel",), types, str(tmp_path))
    assert compiler._child is not None  # it lives on
    compiler._end()
    for program in (shutil.which("false") or "false", "/no/such/program"):
        monkeypatch.setattr(sys, "executable", program)
        compiler.compile(maker, types, str(tmp_path))
        assert compiler._child is None
    assert kept(tmp_path) == 0


def test_an_interrupt_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its late answer would pass for that to the next question."""
    from longverse.models.kernels.compiler import Compiler

    compiler = Compiler()
    maker, types = small_kernel()
    compiler.compile(("no_such_kernel",), types, str(tmp_path))
    child = compiler._child
    assert child is not None
    assert child.stdout is not None

    class Interrupted:
        closed = False

        def __iter__(self) -> "Interrupted":
            return self

        def __next__(self) -> bytes:
            raise KeyboardInterrupt

        def close(self) -> None:
            self.closed = True

    output, child.stdout = child.stdout, Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        compiler.compile(maker, types, str(tmp_path))
    output.close()
    assert compiler._child is None
    assert child.returncode is not None


def test_a_child_of_whom_nothing_is_asked_ends_and_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from longverse.models.kernels import build, compiler\n"
        "build.chunk_kernel(build.CacheForm(64, 3, 'bf16'), 'amx', 'fold_stretch')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "compiler.IDLE = 0.1\n"
        "compiler.serve()\n"
    )
    environment = {**os.environ, "LONGVERSE_COMMAND": "1"}
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, env=environment) as child:
        assert child.wait(timeout=60) == 0


def test_code_that_cannot_be_kept_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder can be written numba refuses to cache."""
    from longverse.models.kernels import team

    def refusing(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("no locator available")
        return compiled(**options)

    compiled = team.njit
    monkeypatch.setattr(team, "njit", refusing)
    assert team.specialise(lambda x: x + STEP, "add_step", STEP=2)(40) == 42
