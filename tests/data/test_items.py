"""The builder of instruction items: exact lengths, true evidence, all families, restart, inspection, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longverse.data.config import build
from longverse.data.inspect import inspect_items, pieces_of
from longverse.data.long_sft.builder import build_sft, make_context
from longverse.data.long_sft.draft import Claim, Draft, Part, Reject, Turn, fit
from longverse.data.long_sft.gates import Contamination
from longverse.data.long_sft.item import TASKS, parse_item, read_items
from longverse.data.long_sft.offline_en import find_english
from longverse.data.long_sft.offline_zh import find_chinese
from longverse.data.long_sft.plan import SftConfig, plan_items, quotas
from longverse.data.long_sft.pool import write_pool
from longverse.data.long_sft.prompts import fill, variants
from longverse.data.long_sft.real import real_questions
from longverse.data.long_sft.stated import SETS, SPLITS, WITH_HELD_OUT, FactMaker, _table, draw_facts, rivals
from longverse.data.sources import SourceConfig
from longverse.data.text import squash
from longverse.data.vocabulary import ChatCounter, load_vocabulary
from longverse.errors import UserError
from longverse.wording import NOT_STATED, messages
from tests.data.texts import code_tree, history, law, novel, tokenizer_folder, write_jsonl

SOURCES = [
    {"name": "novels", "path": "novels.jsonl"},
    {"name": "histories", "path": "histories.jsonl"},
    {"name": "laws", "path": "laws.jsonl"},
    {"name": "code", "path": "repo", "suffixes": [".py"], "language": "code"},
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    tokenizer_folder(folder / "tok")
    write_jsonl(
        folder / "novels.jsonl", [{"id": f"n{i}", "title": f"The Book {i}", "text": novel(i, 260)} for i in range(6)]
    )
    write_jsonl(
        folder / "histories.jsonl", [{"id": f"h{i}", "title": f"史书{i}", "text": history(i, 200)} for i in range(4)]
    )
    write_jsonl(
        folder / "laws.jsonl", [{"id": f"l{i}", "title": law(i)[0], "text": law(i, 12 + i % 9)[1]} for i in range(40)]
    )
    code_tree(folder / "repo")
    return folder


def config(folder, out, **changes):
    values = {
        "out": str(out), "tokenizer": "tok", "items": 21, "seed": 3, "processes": 1, "sources": SOURCES,
        "lengths": [{"low": 3000, "high": 6000}], "questions_high": 4,
    }  # fmt: skip
    return build(SftConfig, values | changes)


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory):
    return build_sft(config(sources, tmp_path_factory.mktemp("out") / "built"), sources)


def test_items_are_valid_exact_and_of_all_families(built, sources):
    vocabulary = load_vocabulary(str(sources / "tok"))
    items = [item for _, item, problem in read_items(built.path) if item is not None or pytest.fail(problem)]
    assert len(items) == 21
    assert {item.task for item in items} == set(TASKS)
    assert {item.language for item in items} == {"en", "zh"}
    for item in items:
        assert (
            len(vocabulary.chat.encode(item.messages, add_generation_prompt=False)) == item.tokens == item.target_tokens
        )
        assert len(vocabulary.chat.encode(item.messages[:1])) == item.prompt_tokens
        assert 3000 <= item.tokens <= 6000
        for evidence in item.evidence:
            if evidence.complete and item.answers[evidence.question]:
                assert any(
                    squash(a).casefold() in squash(evidence.text).casefold() for a in item.answers[evidence.question]
                )
        if item.recite and item.task == "single_doc_qa":
            assert squash(item.evidence[0].text) in item.messages[1]["content"]
    assert built.report["items"] == 21


def test_documents_are_what_their_sources_say(built, sources):
    originals = {
        (name, row["id"]): row["text"]
        for name in ("novels", "histories", "laws")
        for row in map(json.loads, (sources / f"{name}.jsonl").read_text().splitlines())
    }
    checked = 0
    for _, item, _ in read_items(built.path):
        for shown in item.documents:
            if item.task == "stated_facts" or shown.source == "code":
                continue
            text = item.messages[shown.message]["content"][shown.start : shown.end]
            original = originals[shown.source, shown.id]
            start = text[: max(20, len(text) - 80)]  # the end may carry a mark of omission
            assert original[shown.origin :].startswith(start)
            checked += 1
    assert checked > 40


def test_code_answers_are_what_the_file_says(built, sources):
    for _, item, _ in read_items(built.path):
        if item.task == "code_completion":
            text = (sources / "repo" / item.notes["file"]).read_text()
            assert item.messages[1]["content"] in text
            assert item.notes["symbol"] in item.evidence[0].text


def test_same_file_again_and_with_two_processes(built, sources, tmp_path):
    again = build_sft(config(sources, tmp_path / "two", processes=2), sources)
    assert again.path.read_bytes() == built.path.read_bytes()


@pytest.mark.parametrize("stop", [1, 14])
def test_stopped_and_resumed_gives_the_same_file(built, sources, tmp_path, stop):
    calls = iter(range(10_000))
    made = config(sources, tmp_path / "out")
    with pytest.raises(UserError, match=f"stopped after {stop} of 21 items"):
        build_sft(made, sources, cancelled=lambda: next(calls) + 1 >= stop)
    part, progress = tmp_path / "out" / "items.jsonl.part", tmp_path / "out" / "progress.jsonl"
    with part.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"id": "sft-0')
    if stop > 1:
        progress.write_bytes(progress.read_bytes()[:-7])
    seen = []
    result = build_sft(made, sources, on_progress=lambda done, total: seen.append(done))
    assert seen[0] == stop + (stop == 1)  # nothing but the torn item is built again
    assert result.path.read_bytes() == built.path.read_bytes()


KILLED = """
import sys
from pathlib import Path
from longverse.data.config import build
from longverse.data.long_sft.builder import build_sft
from longverse.data.long_sft.offline_en import find_english
from longverse.data.long_sft.offline_zh import find_chinese
from longverse.data.long_sft.plan import SftConfig
import json
build_sft(build(SftConfig, json.loads(sys.argv[1])), Path(sys.argv[2]), on_progress=lambda *_: print("x", flush=True))
"""


def test_killed_and_resumed_gives_the_same_file(built, sources, tmp_path):
    values = {
        "out": str(tmp_path / "out"), "tokenizer": "tok", "items": 21, "seed": 3, "processes": 1, "sources": SOURCES,
        "lengths": [{"low": 3000, "high": 6000}], "questions_high": 4,
    }  # fmt: skip
    environment = {"LONGVERSE_COMMAND": "1", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    for lines in (3, 6):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, json.dumps(values), str(sources)], stdout=subprocess.PIPE, env=environment
        )
        assert child.stdout is not None
        for _ in range(lines):
            assert child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    result = build_sft(build(SftConfig, values), sources)
    assert result.path.read_bytes() == built.path.read_bytes()


@pytest.fixture(scope="module")
def context(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    write_pool(folder, [build(SourceConfig, s) for s in SOURCES], sources, lambda *_: True)
    return make_context(folder, load_vocabulary(str(sources / "tok")))


@given(seed=st.integers(0, 10**6), spare=st.integers(0, 900))
@settings(max_examples=25, deadline=None)
def test_any_target_within_reach_is_met_exactly(context, seed, spare):
    rng = random.Random(seed)
    opened = context.pool.open(rng.randrange(10))
    language = opened.about.language
    start = rng.randrange(0, 4_000)
    part = Part.of(opened, start, start + rng.randrange(300, 9_000), 2_400)
    draft = Draft("single_doc_qa", "x", language, [part], [Turn("{documents}\n\nWhy?", "So.")], [Claim(0, 0, 5)])
    low = context.chat.count(
        [{"role": "user", "content": part.text + "\n\nWhy?"}, {"role": "assistant", "content": "So."}]
    )
    spare = min(spare, context.counter.count(part.tail) - 12)
    try:
        item = fit(draft, low + spare, "i", 0, context.chat, context.counter)
    except Reject:
        assert spare <= 3  # a mark of omission alone may take more than is left
        return
    assert len(context.chat.chat.encode(item.messages, add_generation_prompt=False)) == low + spare
    shown = item.messages[0]["content"][item.documents[0].start : item.documents[0].end]
    assert opened.text[start:].startswith(shown[: len(part.text)])


@given(st.lists(st.integers(0, 25_000), min_size=2, max_size=2), st.integers(1, 4_000))
@settings(max_examples=40, deadline=None)
def test_lazy_counts_agree_with_counting(context, span, tokens):
    opened = context.pool.open(1)
    start = opened.end_for(min(span), 1)
    end = opened.end_for(start, tokens)
    assert opened.tokens_between(start, end) == context.counter.count(opened.text[start:end]) <= tokens
    back = opened.start_for(end, tokens)
    assert context.counter.count(opened.text[back:end]) <= tokens


def test_depths_are_even(sources, tmp_path):
    specs = plan_items(config(sources, tmp_path, items=500))
    bins = [sum(int(s.depth * 10) == b for s in specs) for b in range(10)]
    assert max(bins) - min(bins) <= 4
    assert quotas({"a": 1, "b": 1, "c": 1}, 10).count("a") in (3, 4)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("sets", [("life",), ("work",), ("life", "work")])
def test_held_out_facts_share_nothing_with_training(language, sets):
    kinds, sentences = {}, {}
    for split in SPLITS:
        facts = [f for s in range(40) for f in draw_facts(FactMaker(language, split, random.Random(s), "", sets), 8)]
        kinds[split] = {f.kind for f in facts if f.sort == "plain"}
        sentences[split] = {s for f in facts for s in f.sentences}
        for fact in facts:
            assert "{" not in fact.question + fact.reply + "".join(fact.sentences)
            if fact.sort in ("plain", "several"):
                for sentence, answer in zip(fact.sentences, fact.answers, strict=True):
                    assert answer.casefold() in sentence.casefold()
            if fact.sort == "hop":  # neither half alone joins the bearer with the answer
                assert fact.answers[0] not in fact.sentences[0]
                assert fact.answers[0].casefold() in fact.sentences[1].casefold()
    assert not kinds["train"] & kinds["heldout"]
    assert not sentences["train"] & sentences["heldout"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_near_misses_are_of_the_same_kind_about_another(language):
    for seed in range(40):
        maker = FactMaker(language, "train", random.Random(seed), "", ("life", "work"))
        asked = draw_facts(maker, 8)
        near = rivals(maker, asked, 1.0)
        wanted = [f.kind for f in asked if f.sort in ("plain", "absent")]
        assert len(near) >= 0.7 * len(wanted)
        assert {f.kind for f in near} <= set(wanted)
        for one in near:
            for fact in asked:
                if fact.kind == one.kind and fact.sort != "hop":
                    assert one.answers[0] not in fact.answers
                    assert fact.question != one.question


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_world_has_hundreds_of_relations_each_true_of_its_sentence(language):
    kinds, questions, given_away = set(), set(), []
    for seed in range(150):
        maker = FactMaker(language, "train", random.Random(seed), "", ("world",))
        for fact in [*(maker.plain() for _ in range(12)), maker.absent()]:
            assert "{" not in fact.question + fact.reply + "".join(fact.sentences)
            if fact.sort == "absent":
                assert fact.sentences == ()
                continue
            [sentence] = fact.sentences
            assert fact.answers[0].casefold() in sentence.casefold()
            if fact.answers[0].casefold() in fact.question.casefold():
                given_away.append(fact)  # somebody called Ravenscroft, nicknamed the Raven: the gates drop the item
            kinds.add(fact.kind)
            questions.add(fact.question)
    assert len(kinds) > 180
    assert len(given_away) < 10
    assert len(questions) > 1_500


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_world_has_facts_in_two_sentences_and_collections(language):
    maker = FactMaker(language, "train", random.Random(5), "", ("world",))
    hops = [maker.hop() for _ in range(150)]
    assert len({fact.kind for fact in hops}) > 90
    middles = {value for kind, value in maker._used if kind.endswith(" middle")}
    for fact in hops:
        first, second = fact.sentences
        assert fact.answers[0].casefold() in second.casefold()
        assert not set("{}") & set(first + second + fact.question)
        both = [
            name for name in middles if name.casefold() in first.casefold() and name.casefold() in second.casefold()
        ]
        assert both, "nothing leads from the one sentence to the other"
        assert not any(name in fact.question for name in both)
    for seed in range(40):
        fact = FactMaker(language, "train", random.Random(seed), "", ("world",)).several(3)
        assert len(set(fact.answers)) == len(set(fact.sentences)) == 3


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_a_fact_in_two_sentences_states_is_not_asked_as_absent(language):
    for seed in range(60):
        maker = FactMaker(language, "train", random.Random(seed), "", ("world",))
        hop = maker.hop()
        stated = [(kind, name) for _, name, kind in maker._bearers if kind != hop.kind]
        assert len(stated) == 2
        assert set(stated) <= maker._used, hop
        for _ in range(30):
            before = set(maker._used)
            maker.absent()
            assert not (maker._used - before) & set(stated)


def test_sorts_of_question_have_their_shares():
    maker = FactMaker("en", "train", random.Random(1), "", ("life", "work", "world"))
    facts = draw_facts(maker, 200, {"plain": 0.2, "hop": 0.5, "several": 0.3, "absent": 0})
    counts = {sort: sum(fact.sort == sort for fact in facts) for sort in ("plain", "hop", "several", "absent")}
    assert facts[0].sort == "plain"
    assert counts["absent"] == 0
    assert 80 <= counts["hop"] <= 120
    assert 40 <= counts["several"] <= 80


def test_real_questions_name_what_stands_once():
    for language, text in (("en", novel(3, 120)), ("zh", law(5, 14)[1])):
        finds = (find_english if language == "en" else find_chinese)(text, "A title")
        made = real_questions(text, language, 12, random.Random(1), finds, text)
        assert len(made) >= 3
        assert len({real.sentence for real in made}) == len(made)
        for real in made:
            assert text.count(real.sentence) == 1
            assert all(text.count(words) == 1 for words in real.once)
            if real.kind in ("phrase", "words"):
                assert any(words in real.question and words in real.sentence for words in real.once)
                assert real.sentence not in real.question


def test_items_in_the_words_of_ask(sources, tmp_path):
    """The very messages that `longverse ask` sends, for the first question; the same wording for those that follow."""
    made = config(
        sources, tmp_path / "out", items=8, tasks={"stated_facts": 1}, recite=0, quote=True, facts=["life", "world"],
        real=0.4, ask=1.0, lengths=[{"low": 1500, "high": 4000}], questions_low=6, questions_high=12,
    )  # fmt: skip
    sorts = set()
    for _, item, _ in read_items(build_sft(made, sources).path):
        [shown] = item.documents
        text = item.messages[shown.message]["content"][shown.start : shown.end]
        first = item.messages[1]["content"].split("\n")[-2].removeprefix("Question: ").removeprefix("问题：")
        expected = messages(text, first)
        assert item.messages[0] == expected[0]
        assert item.messages[1]["content"].replace(text, text.strip("\n")) == expected[1]["content"]
        for asked in item.messages[3::2]:
            assert asked["content"].startswith(("Question: ", "问题："))
        replies = [m["content"] for m in item.messages if m["role"] == "assistant"]
        for sort, reply, answers in zip(item.notes["sorts"], replies, item.answers, strict=True):
            sorts.add(sort)
            if sort in ("plain", "real"):  # copied from the text
                assert squash(reply).replace(" ", "") in squash(text).replace(" ", "")
            if sort == "plain":
                assert answers[0].casefold() in reply.casefold()
        for evidence in item.evidence:
            assert text[evidence.start : evidence.end] == evidence.text
    assert {"plain", "real"} <= sorts


def test_what_is_not_stated_is_said_in_the_words_that_ask_knows():
    assert tuple(variants("not_stated", language)[0] for language in ("en", "zh")) == NOT_STATED


@pytest.mark.parametrize("language", ["en", "zh"])
def test_only_sets_that_hold_kinds_out_can_be_held_out(language, sources, tmp_path):
    for name in SETS:
        table = _table(language, (name,))
        held = {group: any(kind["heldout"] for kind in table[group]) for group in ("kinds", "hops", "several")}
        assert set(held.values()) == {name in WITH_HELD_OUT}, (name, held)
    message = "split heldout needs facts of kinds that training never shows, and world has none: add life or work"
    with pytest.raises(UserError, match=message):
        config(sources, tmp_path, facts=["world"], split="heldout")
    with pytest.raises(UserError, match=message):
        FactMaker(language, "heldout", random.Random(0), "", ("world",))
    made = config(sources, tmp_path, facts=["world", "life"], split="heldout")
    assert len(draw_facts(FactMaker(language, made.split, random.Random(0), "", made.facts), 8)) == 8


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_a_title_may_hold_another_line_end(sources, tmp_path, mark):
    write_jsonl(tmp_path / "odd.jsonl", [{"id": f"n{mark}1", "title": f"The{mark}Book", "text": novel(1, 40)}])
    write_pool(tmp_path, [SourceConfig("odd", "odd.jsonl")], tmp_path, lambda *_: True)
    [document] = make_context(tmp_path, load_vocabulary(str(sources / "tok"))).pool.documents
    assert (document.id, document.title) == (f"n{mark}1", f"The{mark}Book")


def test_real_and_ask_need_quote(sources, tmp_path):
    with pytest.raises(UserError, match="need quote"):
        config(sources, tmp_path, ask=0.5)


def test_absent_facts_are_absent():
    for seed in range(60):
        maker = FactMaker("en", "train", random.Random(seed))
        facts = draw_facts(maker, 10)
        stated = {(f.kind, f.question) for f in facts if f.sort == "plain"}
        for fact in facts:
            if fact.sort == "absent":
                assert (fact.kind, fact.question) not in stated


def test_contamination_is_found(sources, tmp_path):
    text = novel(2, 260)
    write_jsonl(tmp_path / "bench.jsonl", [{"context": text[4_000:9_000], "answers": ["x"]}])
    grams = Contamination.of_files([tmp_path / "bench.jsonl"])
    assert grams.hits(text, "en") > 100
    assert grams.hits(novel(3, 100), "en") < 64
    made = config(
        sources, tmp_path / "out", items=4, decontaminate=[str(tmp_path / "bench.jsonl")], tasks={"single_doc_qa": 1},
        languages={"en": 1},
    )  # fmt: skip
    result = build_sft(made, sources)
    assert result.report["skipped"]["novels"]["counts"]["overlaps a decontamination file"] >= 1
    assert all(item.documents[0].id != "n2" for _, item, _ in read_items(result.path))
    with pytest.raises(UserError, match="does not exist"):
        Contamination.of_files([tmp_path / "none.jsonl"])


def test_inspection(built, tmp_path, sources):
    lines = built.path.read_text().splitlines()
    broken = json.loads(lines[2])
    broken["evidence"][0]["start"] += 1
    short = json.loads(lines[3]) | {"tokens": 5}
    extra = json.loads(lines[4]) | {"taks": 1}
    missing = {k: v for k, v in json.loads(lines[5]).items() if k != "answers"}
    rows = [
        lines[0],
        lines[1],
        json.dumps(broken),
        json.dumps(short),
        json.dumps(extra),
        json.dumps(missing),
        "{",
        lines[0],
    ]
    (tmp_path / "f.jsonl").write_text("\n".join(rows) + "\n")
    counter = ChatCounter(load_vocabulary(str(sources / "tok")))
    found = inspect_items(tmp_path / "f.jsonl", samples=2, counter=counter)
    assert (found.items, found.wrong) == (2, 6)
    said = dict(found.problems)
    assert "not what stands at its offsets" in said[3]
    assert "prompt_tokens" in said[4]
    assert "'taks' is not known" in said[5]
    assert "'answers' is missing" in said[6]
    assert "no JSON" in said[7]
    assert "occurs twice" in said[8]
    assert sum(found.lengths.values()) == 2
    for _, item in found.samples:
        pieces = pieces_of(item, 0)
        marked = "".join(p.text for p in pieces if p.evidence)
        assert all(e.text in marked for e in item.evidence)
        assert sum(len(p.text) + p.left_out for p in pieces) == len(item.messages[0]["content"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no line"):
        inspect_items(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"sumary": 1}}, "did you mean 'summary'"),
        ({"languages": {"fr": 1}}, "en and zh"),
        ({"lengths": [{"low": 9000, "high": 400}]}, "low <= high"),
        ({"recite": 2}, "recite must be"),
        ({"split": "test"}, "train or heldout"),
        ({"items": 0}, "at least 1"),
        ({"teacher": {"url": "ftp://x", "model": "m"}}, "http"),
    ],
)
def test_wrong_configurations(sources, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        config(sources, tmp_path, **changes)


def test_what_the_documents_cannot_give_is_refused_at_once(sources, tmp_path):
    with pytest.raises(UserError, match="is to reach 90,000 tokens and the longest document"):
        build_sft(
            config(sources, tmp_path / "a", tasks={"multi_turn": 1}, lengths=[{"low": 90_000, "high": 90_000}]), sources
        )
    with pytest.raises(UserError, match="needs documents of the kind 'code'"):
        build_sft(config(sources, tmp_path / "b", sources=SOURCES[:3]), sources)


def test_two_builders_in_one_folder(sources, tmp_path):
    from longverse.data.lock import FolderLock

    with FolderLock(tmp_path / "out"), pytest.raises(UserError, match="another builder"):
        build_sft(config(sources, tmp_path / "out"), sources)


def test_prompts_have_their_places():
    for language in ("en", "zh"):
        for name in ("single_doc_qa", "multi_doc_qa", "multi_turn", "stated_facts"):
            assert all("{documents}" in v and "{question}" in v for v in variants(name, language))
        assert all("{prefix}" in v for v in variants("code_completion", language))
    assert fill("a {x} {y}", x="{y}") == "a {y} {y}"


def test_items_refuse_unknown_shapes():
    with pytest.raises(UserError, match="no JSON object"):
        parse_item([1])
