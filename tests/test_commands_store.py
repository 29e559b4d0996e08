"""`longverse read`, `library` and `plan`, and how `ask` finds what was read."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longverse import UserError, api, cli, commands_open
from longverse.documents.ask import prepare
from longverse.documents.reader import decode
from longverse.inference import memory
from longverse.inference.engine import Engine, Session
from longverse.models.chat import ChatFormat
from longverse.models.quantize import quantize
from longverse.models.tokenizer import Tokenizer
from tests.helpers import random_network, tiny_config
from tests.models.folders import save_folder, save_tokenizer

pytestmark = pytest.mark.usefixtures("no_compiling")

ROOT = Path(__file__).parent.parent
TEXT = "The mill stands in a town.\n\nIt grinds the grain.\n\n" * 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(folder, tiny_config(max_position_embeddings=4096))
    return str(folder)


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of its own."""
    folder = tmp_path / "library"
    monkeypatch.setattr("longverse.inference.store.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("longverse.inference.rates._file", lambda: tmp_path / "rates.json")
    return folder


@pytest.fixture
def mill(tmp_path: Path) -> str:
    path = tmp_path / "mill.txt"
    path.write_text(TEXT)
    return str(path)


class Runner:
    """Runs a command line here: exit code, standard output, standard error."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = cli.main(list(arguments))
        return code, *self.capsys.readouterr()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


def ask(run: Runner, mill: str, tiny: str, *more: str) -> dict[str, object]:
    code, out, err = run("ask", mill, "Where?", "-m", tiny, "-n", "8", "--cite", "off", "--json", *more)
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


# ---- read and ask ------------------------------------------------------------------------------------------


def test_ask_finds_what_was_read_and_answers_the_same(run: Runner, mill: str, tiny: str) -> None:
    before = ask(run, mill, tiny)
    code, out, err = run("read", mill, "-m", tiny)
    assert code == 0
    assert f"mill.txt: {len(Path(mill).read_text().split()):,} words, " in err
    assert "window of 4,096 tokens, with" in err
    assert "mill.txt: " in out
    assert "tokens kept" in out
    after = ask(run, mill, tiny)
    assert after["answer"] == before["answer"]
    stats = after["stats"]
    assert isinstance(stats, dict)
    assert stats["prompt_tokens"] - stats["reused_tokens"] < 100
    again = json.loads(run("read", mill, "-m", tiny, "--json")[1])
    assert again["read_tokens"] == 0
    assert again["tokens"] == stats["reused_tokens"]


def test_ask_keeps_where_it_is_told_to(run: Runner, mill: str, tiny: str, library: Path) -> None:
    plain = ask(run, mill, tiny)
    assert not [*library.glob("*/manifest.json")]
    code, out, err = run("ask", mill, "Where?", "-m", tiny, "-n", "8", "--cite", "off", "--keep")
    assert code == 0
    assert out.strip() == str(plain["answer"]).strip()
    lines = err.splitlines()
    [plan] = [number for number, line in enumerate(lines) if line.startswith("Plan: ")]
    [read] = [number for number, line in enumerate(lines) if line.startswith("Read ")]
    assert plan < read
    assert len([*library.glob("*/manifest.json")]) == 1
    shutil.rmtree(library)
    stats = ask(run, mill, tiny, "--keep")["stats"]
    assert stats["reused_tokens"] == 0  # type: ignore[index]  # it was read just now, if not by the question
    assert stats["prefill_seconds"] > 0.01  # type: ignore[index]
    after = ask(run, mill, tiny, "--keep")
    assert after["answer"] == plain["answer"]
    assert after["stats"]["reused_tokens"] > 500  # type: ignore[index]
    assert "nothing new to read" in run("read", mill, "-m", tiny)[1]  # it is the reading that `read` would keep
    code, _, err = run("ask", mill, "Where is the mill?", "-m", tiny, "-n", "8", "--select", "--keep")
    assert code == 0
    assert "are not kept" in err


def test_who_waited_long_is_told_how_to_keep(
    run: Runner, mill: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longverse.commands_ask.LONG", 0.0)
    told = "with --keep the next question starts at once"

    def ask(*more: str) -> bool:
        said = run("ask", mill, "Where is the mill?", "-m", tiny, "-n", "4", *more)[2]
        return told in " ".join(said.split())

    assert ask("--cite", "off")
    assert not ask("--select")
    assert not ask("--cite", "off", "--keep")
    assert not ask("--cite", "off")  # it is kept now


@pytest.mark.parametrize(("when", "kept"), [(2, True), (2, False), (3, True)])  # 3: in the last chunk
def test_a_stopped_ask_says_what_is_kept(
    run: Runner, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, when: int, kept: bool
) -> None:
    if not kept:
        monkeypatch.setenv("LONGVERSE_LIBRARY_LIMIT", "1KB")
    (tmp_path / "long.txt").write_text(TEXT * 4)
    forward, passes = Session._forward, []

    def pressed(self: Session, ids: list[int]) -> torch.Tensor:
        passes.append(len(ids))
        if len(passes) == when:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, ids)

    monkeypatch.setattr(Session, "_forward", pressed)
    code, out, err = run("ask", str(tmp_path / "long.txt"), "Where?", "-m", tiny, "-n", "4", "--keep")
    assert (code, out) == (130, "")
    monkeypatch.undo()
    if not kept:
        assert "the library's limit is" in err
        assert "Nothing was kept." in err
        return
    [said] = [line for line in err.splitlines() if line.startswith("Stopped.")]
    assert "asking again reads on from there" in said
    number = int(said.split()[1].replace(",", ""))
    assert number == sum(passes) > 1000


def test_the_plan_is_one_line_before_the_answer(run: Runner, mill: str, tiny: str) -> None:
    _, _, err = run("ask", mill, "Where?", "-m", tiny, "-n", "4", "--cite", "off")
    [line] = [line for line in err.splitlines() if line.startswith("Plan: ")]
    assert "tokens · full cache " in line
    run("read", mill, "-m", tiny)
    _, _, err = run("ask", mill, "Where?", "-m", tiny, "-n", "4", "--cite", "off")
    assert "kept, not read again" in err
    assert run("ask", mill, "Where?", "-m", tiny, "-n", "4", "--cite", "off", "--quiet")[2] == ""


def test_another_cache_system_or_model_reads_anew(run: Runner, mill: str, tiny: str, tmp_path: Path) -> None:
    run("read", mill, "-m", tiny, "--cache", "int8", "--system", "Be brief.")
    other = tmp_path / "other"
    save_folder(other, tiny_config(max_position_embeddings=4096, rope_theta=20_000.0))

    def reused(*more: str, model: str = tiny) -> object:
        stats = ask(run, mill, model, *more)["stats"]
        assert isinstance(stats, dict)
        return stats["reused_tokens"]

    kept = reused("--system", "Be brief.")
    assert isinstance(kept, int)
    assert kept > 500
    assert reused("--system", "Be brief.", "--cache", "full") == 0
    assert reused() == 0
    assert reused("--system", "Be brief.", model=str(other)) == 0


def test_a_damaged_reading_is_mended_with_a_warning(run: Runner, mill: str, tiny: str, library: Path) -> None:
    before = ask(run, mill, tiny)
    run("read", mill, "-m", tiny)
    [keys] = library.glob("*/keys.bin")
    content = bytearray(keys.read_bytes())
    content[100] ^= 4
    keys.write_bytes(bytes(content))
    code, out, err = run("ask", mill, "Where?", "-m", tiny, "-n", "8", "--cite", "off")
    assert code == 0
    assert err.count("damaged") == 1
    assert out.strip() == before["answer"]
    assert "damaged" not in run("ask", mill, "Where?", "-m", tiny, "-n", "8", "--cite", "off")[2]


def test_a_document_past_the_window_is_kept_as_pages(run: Runner, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 9)
    code, out, err = run("read", str(path), "-m", tiny, "--json")
    assert code == 0
    record = json.loads(out)
    assert record["attention"] == "pages"
    assert record["tokens"] > 4096
    assert record["documents"][0]["name"] == "long.txt"
    assert "It does not fit" in err
    assert "it is read by pages" in err
    stats = ask(run, str(path), tiny)["stats"]
    assert isinstance(stats, dict)
    assert stats["attention"] == "pages"
    assert stats["reused_tokens"] == record["tokens"]
    assert "pages" in run("library")[1]


@pytest.mark.parametrize("more", [("--attention", "pages"), ("--cache", "int8"), ("--rope", "dynamic:2")])
def test_ask_finishes_a_stopped_reading_in_its_own_format(
    run: Runner, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, str]
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 4)
    calls = iter(range(100))

    @contextmanager
    def stops_soon() -> Iterator[Callable[[], bool]]:
        yield lambda: next(calls) >= 1

    with monkeypatch.context() as patch:
        patch.setattr("longverse.console.interruptible", stops_soon)
        code, _, err = run("read", str(path), "-m", tiny, *more)
    assert code == 130
    assert "tokens are kept: the same command reads on from there" in err
    [before] = json.loads(run("library", "--json")[1])["documents"]
    assert before["state"] == "unfinished"
    assert 0 < 2 * before["length"] < before["tokens"]
    asked_with = () if more[0] == "--cache" else more  # the format of what is kept is taken by itself
    ask(run, str(path), tiny, *asked_with)
    [after] = json.loads(run("library", "--json")[1])["documents"]
    assert (after["id"], after["state"]) == (before["id"], "whole")


def test_a_short_common_beginning_does_not_choose_the_format(run: Runner, tiny: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text(TEXT * 2)
    other.write_text(TEXT * 2 + "The mill is sold. Nobody knows who bought it.\n\n" * 60)
    assert run("read", str(one), "-m", tiny, "--cache", "int8")[0] == 0
    stats = ask(run, str(other), tiny)["stats"]
    assert isinstance(stats, dict)
    assert stats["cache"] == "full"
    assert stats["reused_tokens"] == 0


def test_the_next_command_repeats_what_was_given(run: Runner, mill: str, tiny: str) -> None:
    _, _, err = run("read", mill, "-m", tiny, "--attention", "sparse:0.9", "--system", "Be brief.")
    [line] = [line for line in err.splitlines() if line.startswith("Next: ")]
    assert line == f"Next: longverse ask {mill} \"…\" --model {tiny} --system 'Be brief.' --attention sparse:0.9"


def test_a_model_that_says_nothing_has_not_found_it(
    run: Runner, mill: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(reason: str) -> Callable[..., Iterator[str]]:
        def stream(session: Session, *arguments: Any, **options: Any) -> Iterator[str]:
            session.stats.finish_reason = reason
            return iter(())

        return stream

    monkeypatch.setattr(Session, "stream", silent("stop"))
    record = json.loads(run("ask", mill, "Where?", "-m", tiny, "--json")[1])
    assert (record["answer"], record["found"], record["citations"]) == ("Not found in the document.", False, [])
    assert run("ask", mill, "Where?", "-m", tiny, "-q")[:2] == (0, "Not found in the document.\n")
    assert json.loads(run("ask", mill, "Where?", "-m", tiny, "--json", "--cite", "off")[1])["answer"] == ""
    monkeypatch.setattr(Session, "stream", silent("length"))  # cut off before its first word
    record = json.loads(run("ask", mill, "Where?", "-m", tiny, "--json")[1])
    assert (record["answer"], record["found"]) == ("", False)


@pytest.mark.slow
def test_a_reading_that_is_stopped_goes_on(mill: str, tiny: str, tmp_path: Path) -> None:
    """Ctrl-C, in a process of its own with a slow reading: 130, what was read is kept, the next goes on from there."""
    script = (
        "import os, sys, time\n"
        "os.environ['LONGVERSE_COMMAND'] = '1'\n"
        "from longverse import cli\n"
        "from longverse.inference import engine, store_reading\n"
        "engine.CHUNK, store_reading.FLUSH_SECONDS = 16, 0.05\n"
        "forward = engine.Session._forward\n"
        "def slow(self, ids):\n"
        "    time.sleep(float(sys.argv[1]))\n"
        "    return forward(self, ids)\n"
        "engine.Session._forward = slow\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "LONGVERSE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    arguments = ["read", mill, "-m", tiny, "--json"]
    first = subprocess.Popen(
        [*command, "0.2", *arguments], env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        progress = list(tmp_path.glob("library/*/progress.json"))
        if progress and json.loads(progress[0].read_text())["records"]:
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "are kept: the same command reads on from there" in err
    done = subprocess.run([*command, "0", *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)
    record = json.loads(done.stdout)
    assert 0 < record["read_tokens"] < record["tokens"]


WORDS = st.text(alphabet=st.characters(codec="ascii", categories=("L", "N", "P", "Zs")), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=WORDS.filter(str.strip), questions=st.lists(WORDS.filter(str.strip), min_size=2, max_size=3))
def test_the_documents_end_is_where_all_prompts_part(plain: Engine, text: str, questions: list[str]) -> None:
    """Never past what the prompts share, and all of the document."""
    document = decode(text.encode(), "x.txt")
    prompts = prepare(plain, document, questions, 8)
    end = commands_open.document_end(plain, prompts)
    shared = min(len(ids) for ids in prompts.ids)
    assert all(ids[:end] == prompts.ids[0][:end] for ids in prompts.ids)
    assert 0 < end < shared
    assert document.text.strip("\n") in plain.tokenizer.decode(prompts.ids[0][:end], skip_special=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("plain")
    save_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return Engine(random_network(tiny_config(max_position_embeddings=4096)), tokenizer, ChatFormat("plain", tokenizer))


# ---- library -----------------------------------------------------------------------------------------------


def test_library_lists_removes_and_prunes(run: Runner, mill: str, tiny: str, tmp_path: Path) -> None:
    assert "Nothing is kept" in run("library")[1]
    other = tmp_path / "other.txt"
    other.write_text(TEXT[:200])
    run("read", mill, "-m", tiny)
    run("read", str(other), "-m", tiny)
    listed = run("library")[1]
    assert [line.split()[1] for line in listed.splitlines()[1:3]] == ["other.txt", "mill.txt"]
    record = json.loads(run("library", "--json")[1])
    assert [one["name"] for one in record["documents"]] == ["other.txt", "mill.txt"]
    assert record["bytes"] == sum(one["bytes"] for one in record["documents"]) > 0
    assert all(one["state"] == "whole" for one in record["documents"])
    size = record["documents"][0]["bytes"]
    pruned = json.loads(run("library", "prune", "--limit", str(size), "--json")[1])
    assert [one["name"] for one in pruned["removed"]] == ["mill.txt"]
    assert run("library", "remove", "other.txt")[1].startswith("removed other.txt")
    assert json.loads(run("library", "--json")[1])["documents"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("library", "remove", "nothing.txt"), "keeps no document 'nothing.txt'"),
        (("library", "prune", "--limit", "much"), "'much' is no amount of memory"),
        (("read", "nowhere.txt"), "no file nowhere.txt"),
        (("read", "MILL", "-m", "TINY", "--limit", "1kB"), "the library's limit is"),
        (("read", "MILL", "-m", "TINY", "--cache", "int3"), "no cache format 'int3'"),
        (("ask", "MILL", "Where?", "-m", "TINY", "--cache", "int3"), "no cache format 'int3'"),
        (("ask", "MILL", "Where?", "-m", "TINY", "--attention", "none"), "no attention 'none'"),
        (("plan", "XVERSE-13B-256K", "--gpu", "potato"), "'potato' is not known"),
        (("plan", "XVERSE-13B-256K", "--context", "long", "--gpu", "H100"), "'long' is no length in tokens"),
        (("plan", "TINY", "--gpu", "H100", "--measure"), "leave it out with --gpu"),
        (("plan", "nowhere"), "Unknown model"),
    ],
)
def test_mistakes_are_one_sentence(run: Runner, mill: str, tiny: str, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run(*({"MILL": mill, "TINY": tiny}.get(word, word) for word in arguments))
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert err.count("longverse: ") == 1


def test_too_little_memory_is_said_before_any_work(
    run: Runner, mill: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Session, "_forward", no_work)
    monkeypatch.setattr(memory, "memory_of_machine", lambda: (2**30, 2**10))
    code, _, err = run("ask", mill, "Where?", "-m", tiny, "-n", "4")
    assert code == 2
    assert "are free: give a shorter document or close other programs" in err.splitlines()[-1]


def test_the_cache_is_the_most_precise_that_the_memory_holds(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    needs, _ = memory.requirements(plain, 4000)
    assert list(needs) == ["full", "int8", "int4"]
    for form in needs:
        free = needs[form] / 0.97 + 64
        monkeypatch.setattr(memory, "memory_of_machine", lambda free=free: (2**40, int(free)))
        expected = next(name for name, need in needs.items() if need <= needs[form])
        assert commands_open.choose_cache(plain, 4000, "auto", quiet=True) == expected


def test_a_card_without_room_for_any_cache_borrows_the_machines_memory(
    plain: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = SimpleNamespace(device=torch.device("cuda"), config=plain.network.config, dtype=torch.bfloat16)
    engine: Any = SimpleNamespace(network=card, name="tiny", kept=torch.bfloat16)
    needs = {"full": 3e9, "int8": 2e9, "int4": 1e9}
    monkeypatch.setattr(memory, "requirements", lambda engine, tokens: (needs, int(1.5e9)))
    monkeypatch.setattr("longverse.plan.memory_of_machine", lambda: (2**34, 2**33))

    def choose(cache: str, attention: str = "exact", room: int = 0) -> tuple[str, int] | None:
        return commands_open.choose_beside(engine, 4000, cache, attention, room=room, quiet=False)

    assert choose("auto") is None  # int4 fits the card
    assert choose("int4") is None
    assert not capsys.readouterr().err
    assert choose("int8") == ("int8", 4000)
    assert "kept in the machine's memory" in " ".join(capsys.readouterr().err.split())
    needs.update(int4=1.6e9)
    assert choose("auto") == ("int4", 4000)
    assert choose("auto", room=9000) == ("int4", 9000)
    assert choose("auto", room=10**9) == ("int4", 4000)
    assert choose("auto", "pages") is None
    monkeypatch.setattr("longverse.plan.memory_of_machine", lambda: (2**34, 2**10))
    assert choose("auto") is None
    card.device = torch.device("cpu")
    assert choose("int8") is None


def test_a_session_beside_a_card_answers_and_says_where_its_cache_lies(
    run: Runner, mill: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for form in (None, "full"):
        beside = form and (form, 2000)
        monkeypatch.setattr(commands_open, "choose_beside", lambda *_, beside=beside, **__: beside)
        code, out, _ = run("ask", mill, "Where?", "-m", tiny, "-n", "4", "--json")
        assert code == 0
        answers.append(json.loads(out))
    assert [answer["stats"]["cache_home"] for answer in answers] == ["device", "machine"]


# ---- plan --------------------------------------------------------------------------------------------------


def test_plan_shows_every_choice_and_marks_one(run: Runner, tmp_path: Path) -> None:
    code, out, _ = run("plan", "xverse/XVERSE-13B-256K", "--context", "256K", "--gpu", "H100")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith(("bf16", "int8", "int4"))]
    assert len(rows) == 9
    assert [row[:1] + row[3:4] for row in rows if row[-1] == "chosen"] == [["int8", "int4"]]
    assert "never measured here" in out
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config()))
    record = json.loads(run("plan", "--config", str(config), "--context", "1K", "--gpu", "4090", "--json")[1])
    assert record["window"] == 128
    assert record["remarks"] == [f"the window of {tmp_path.name} is 128 tokens"]
    assert record["choice"]["weights"] == "bf16"


def test_plan_knows_a_release_by_its_bare_config(run: Runner, tmp_path: Path) -> None:
    """The real file of the 256K model says nothing of RoPE and a window of 32,768."""
    config = tiny_config(
        "xverse", num_hidden_layers=40, hidden_size=5120, intermediate_size=13824, num_attention_heads=40,
        num_key_value_heads=None, head_dim=None, vocab_size=100_534, max_position_embeddings=32_768, rope_theta=None,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    record = json.loads(run("plan", str(tmp_path), "--gpu", "80GB", "--json")[1])
    assert record["context"] == record["window"] == 262_144
    assert record["choice"]["total_bytes"] < 80e9


def test_plan_of_this_machine(run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SECONDS", 0.0), ("PAST", 64), ("AT_LEAST", 1)):
        monkeypatch.setattr(f"longverse.inference.rates.{name}", value)
    monkeypatch.setattr(
        "longverse.inference.rates.all_figures", lambda dtype: [("linear", "bf16"), ("linear", "float32")]
    )
    code, out, _ = run("plan", tiny, "--context", "1K", "--memory", "8GB")
    assert code == 0
    assert "measured rates" in out
    assert "Everything fits in full precision" in out


def test_weights_that_are_in_memory_already_are_not_needed_once_more(tmp_path: Path) -> None:
    """Only weights that are views of a file still have to find room."""
    save_folder(tmp_path / "m", tiny_config(tie_word_embeddings=True), dtype=torch.bfloat16)
    stored = sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    as_stored = Engine.load(str(tmp_path / "m"), dtype="bfloat16", device="cpu", weights="full").network
    assert 0.9 * stored < as_stored.mapped_bytes <= stored
    assert Engine.load(str(tmp_path / "m"), dtype="float32", device="cpu").network.mapped_bytes == 0
    quantize(str(tmp_path / "m"), tmp_path / "small", bits=8)
    small = Engine.load(str(tmp_path / "small"), dtype="bfloat16", device="cpu").network
    assert 0 < small.mapped_bytes < 0.5 * stored  # embedding and norms


def test_every_command_looks_at_the_memory_first(
    run: Runner, mill: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Session, "_forward", no_work)
    monkeypatch.setattr(memory, "memory_of_machine", lambda: (2**30, 2**10))
    for line in (
        ["generate", "The mill"],
        ["summarize", mill],
        ["demo", "--tokens", "1000", "--questions", "1", "--folder", str(tmp_path)],
    ):
        code, _, err = run(*line, "-m", tiny)
        assert code == 2, (line, err)
        assert "are free" in err, line
    with pytest.raises(UserError, match="are free"):
        api.load(tiny, device="cpu").read(mill).ask("Where?")


def test_a_file_with_a_name_of_another_encoding_is_kept(run: Runner, mill: str, tiny: str, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9.txt")
    odd.write_text(TEXT)
    assert run("read", str(odd), "-m", tiny, "--quiet")[0] == 0
    assert "caf" in run("library")[1]


def test_a_limit_that_is_none_says_where_it_stands(
    run: Runner, mill: str, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGVERSE_LIBRARY_LIMIT", "lots")
    code, _, err = run("ask", mill, "Where?", "-m", tiny)
    assert code == 2
    assert "LONGVERSE_LIBRARY_LIMIT: 'lots'" in err
