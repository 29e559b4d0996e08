"""The offline rules: what they find is true, and what would be ambiguous or false is left out."""

import json
import random
import re
from collections import Counter

import pytest

from longverse.data.config import build
from longverse.data.long_sft.builder import build_one, make_context
from longverse.data.long_sft.context import Spec
from longverse.data.long_sft.few_shot import _draft as few_shot_draft
from longverse.data.long_sft.few_shot import few_shot
from longverse.data.long_sft.offline_code import find_code
from longverse.data.long_sft.offline_zh import articles, book, find_chinese
from longverse.data.long_sft.pool import Opened, PoolDocument, write_pool
from longverse.data.long_sft.summary import _digest, _headings, _persons
from longverse.data.sources import Skipped, SourceConfig, read_source
from longverse.data.text import paragraphs, squash_zh
from longverse.data.vocabulary import load_vocabulary
from tests.data.texts import history, law, novel, tokenizer_folder, write_jsonl

SOURCES = [{"name": name, "path": f"{name}.jsonl"} for name in ("novels", "histories", "laws")]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    tokenizer_folder(folder / "tok")
    for name, make, count in (("novels", novel, 6), ("histories", history, 4)):
        rows = [{"id": f"{name}{i}", "title": f"{name} {i}", "text": make(i, 220)} for i in range(count)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    rows = [{"id": f"l{i}", "title": law(i)[0], "text": law(i, 12 + i % 9)[1]} for i in range(40)]
    write_jsonl(folder / "laws.jsonl", rows)
    write_pool(folder, [build(SourceConfig, s) for s in SOURCES], folder, lambda *_: True)
    return make_context(folder, load_vocabulary(str(folder / "tok")))


def spec(task, language, target, index=0, depth=0.5):
    return Spec(index, 0, 7, task, language, target, depth, False, "train", 3)


@pytest.mark.parametrize(
    ("language", "kind"), [("en", "few_shot_source"), ("en", "few_shot_speaker"), ("zh", "few_shot_law")]
)
@pytest.mark.parametrize("index", range(4))
def test_labelled_examples_never_grow(context, language, kind, index):
    wanted = spec("few_shot", language, 3_000 + 811 * index, index)
    draft = few_shot_draft(context, wanted, wanted.rng, kind)
    free, *labelled = draft.parts
    assert (draft.elastic_index(), free.after) == (0, "")
    assert free.tail
    assert all(part.after and not part.tail for part in labelled)
    if kind == "few_shot_speaker":  # one verb of speech a passage, and the label is its subject
        for part in labelled:
            assert re.findall(r"said (\w+)", part.text) == [part.after.split(": ")[1]]
    if kind == "few_shot_law":
        assert not any("第" in part.text.split("\n", 1)[0][:2] or "\n第" in part.text for part in labelled)
    assert draft.notes["labels"] == len({part.after for part in labelled}) >= 2
    assert draft.notes["examples"] == len(labelled)
    claim = draft.claims[0]
    assert kind == "few_shot_speaker" or draft.parts[claim.part].after.endswith(draft.turns[0].reply)


def test_few_shot_items_fit(context):
    for language in ("en", "zh"):
        assert build_one(context, spec("few_shot", language, 4_001), 20, None).line
        assert few_shot(context, spec("few_shot", language, 4_001)).parts[0].tail


def test_no_relatives_and_offices_as_names_and_places():
    text = "\n\n".join(
        [
            "休弟夤，字元明，位太子舍人，卒。",
            "弟宽，字仲和，是太中舍人，早卒。",
            "温子升，字鹏举，自云太原人，晋大将军之后。",
            "裴松之，字世期，河东闻喜人也，少孤。",
            "孙权，字仲谋，吴郡富春人也，坚次子。",
            "孟鸾，字龙儿，不知何许人也，少勇。",
            "长子恪，字元逊，琅邪阳都人，有名。",
        ]
    )
    found = find_chinese(text, "史书")
    homes = {f.question: f.answers[0] for f in found if f.kind == "birthplace"}
    assert homes == {"文中介绍孙权是哪里人？": "吴郡富春"}
    assert {f.reply for f in found if f.kind == "courtesy_name"} == {"温子升字鹏举。", "孟鸾字龙儿。", "孙权字仲谋。"}


def test_definitions_are_asked_by_name():
    text = "class Reader:\n    pass\n\n\ndef parse_args(a, b=1):\n    return a\n"
    once = {f.once for f in find_code(text, "one.py", "en") if f.kind == "defined_in"}
    assert once == {"class Reader", "def parse_args("}
    other = "class Thing:\n    async def parse_args(self):\n        pass\n"
    assert (text + other).count("def parse_args(") == 2  # which makes the question ambiguous among both files


def test_article_is_asked_only_where_its_words_occur_once():
    same = "主管部门应当自收到申请之日起二十日内作出决定并书面告知申请人。"
    lines = ["第一条 为了加强管理工作，维护各方当事人的合法权益，制定本条例。", f"第二条 {same}", f"第三条 {same}"]
    lines += ["第四条 本条例规定的事项由县级以上人民政府负责组织实施和监督。", f"第五条 {same}"]
    found = [f for f in find_chinese("\n".join(lines), "某条例") if f.kind == "article_number"]
    assert [f.answers[0] for f in found] == ["第一条"]


@pytest.mark.parametrize(("language", "tokens"), [("en", 23_000), ("zh", 8_500)])
def test_outlines_leave_no_heading_out(context, language, tokens):
    seen = 0
    for index in range(6):
        item = json.loads(build_one(context, spec("summary", language, tokens, index), 6, None).line or "null")
        if item and item["kind"] == "chapters":
            seen += 1
            shown = item["messages"][0]["content"]
            headings = re.findall(r"^(CHAPTER \d.*|卷.*)$", shown, re.MULTILINE)
            lines = item["messages"][1]["content"].split("\n")
            assert len(headings) == len(lines) >= 4
            for heading, line in zip(headings, lines, strict=True):
                assert heading.replace("\u3000", " ") in line
    assert seen


def test_headings_of_two_lines_and_of_other_forms():
    body = (
        "\n\nThey walked along the shore until the evening came. " + "It rained upon the sea all night. " * 12 + "\n\n"
    )
    text = body + "CHAPTER I. HOW THEY CAME TO THE\nBLACK ISLE" + body + "CHAPTER II. THE END" + body
    spans = _headings(text, 0, len(text), "en")
    assert [text[a:b] for a, b in spans] == ["CHAPTER I. HOW THEY CAME TO THE\nBLACK ISLE", "CHAPTER II. THE END"]
    assert _headings(text + "THE FIFTH PART: HOME" + body, 0, len(text) + 400, "en") == []
    misread = text + "CHAPTER ll" + body
    assert _headings(misread, 0, len(misread), "en") == []  # an outline would leave it out
    below = "\n" + "其年大雨，河水溢，民多流徙，诏发仓廪以赈之。" * 6 + "\n"
    volumes = [f"某书‧卷{number} 帝纪第{number}" + below for number in ("八", "九", "十一")]
    assert len(_headings("".join(volumes[:2]), 0, 10**6, "zh")) == 2
    assert _headings("".join(volumes), 0, 10**6, "zh") == []  # the tenth has no heading


def test_persons_named_most(context):
    """The persons of each part are those whose names really come most often in it, with a clear lead."""
    rng = random.Random(4)
    people = ["Arthur", "Brenda", "Clement", "Dorothea", "Edmund"]
    lines = []
    for part in range(6):
        for n in range(60):
            often = people[part % 5 : part % 5 + 1] * 6 + people
            lines.append(
                f"On day {part}{n:03d} they met {rng.choice(often)} and spoke of {rng.choice(often)} by the river. "
                f"It had rained for {rng.randint(2, 99)} hours, and the fields near the mill lay under water again."
            )
            if n % 6 == 0:
                lines.append(f'"I never saw so much water in the fields of this parish," said {people[n // 6 % 5]}.')
    text = "\n\n".join(lines)
    opened = Opened(PoolDocument(0, "d", "s", "en", "t", 0, 0, len(text)), text, context.counter)
    target = context.counter.count(text[: len(text) * 3 // 4]) + 900
    for seed in range(6):
        draft = _persons(context, spec("summary", "en", target), random.Random(seed), opened, 0, len(text) * 3 // 4)
        parts = re.findall(r"part \d from “([^”]+)”", draft.turns[0].user)
        begins = [text.index(words) for words in parts]
        for line, begin, end in zip(
            draft.turns[0].reply.split("\n"), begins, [*begins[1:], len(text) * 3 // 4], strict=True
        ):
            given = re.findall(r"[A-Z]\w+", line)
            counts = Counter({name: text[begin:end].count(name) for name in people})
            assert given == [name for name, _ in counts.most_common(len(given))]


def test_a_digest_says_only_what_is_certain(context):
    name, text = law(3)

    def digest(text):
        return _digest(Opened(PoolDocument(0, "d", "s", "zh", name, 0, 0, len(text)), text, context.counter))

    line, spans = digest(text)
    assert "维护当事人的合法权益" in line
    assert "共二十四条" in line
    assert re.search(r"自\d+年\d+月1日起施行。$", line)
    assert all(0 <= a < b <= len(text) for a, b in spans)
    assert digest(text.rsplit("自", 1)[0] + "自公布之日起施行。")[0].endswith("自公布之日起施行。")
    assert digest(text.rsplit("自", 1)[0] + "的施行另行规定。") is None
    assert digest(text.replace("第九条", "第八条")) is None  # the number of articles is in doubt
    assert digest(text.replace("，根据有关法律，制定本条例", "。")) is None  # a purpose of another form
    assert digest(text.replace("，根据有关", ",根据有关"))[0].split("；")[0] == line.split("；")[0]  # a narrow comma
    assert digest("一、为了统一办法，现作如下解释。\n\n二、本解释自2001年3月1日起施行。\n") is None  # no articles


def test_titles_within_titles_and_lines_of_chinese():
    assert book("河南省实施《渔业法》办法") == "《河南省实施〈渔业法〉办法》"
    assert squash_zh("第一款。\n\n　　第二款 of\n Python 3，\n好") == "第一款。第二款 of Python 3，好"
    text = "第一条 甲乙丙丁应当依法登记，并且按期报告。\n\n登记以后即可开业经营。\n\n附带的小标题\n\n"
    text += "\n\n".join(f"第{n}条 主管部门应当在{n}日内作出决定并书面告知申请人。" for n in "二三四")
    assert [text[b - 1] for _, _, b in articles(text)] == ["。"] * 4  # the heading belongs to no article
    replies = [f.reply for f in find_chinese(text, "某法") if f.kind in ("article_text", "article_number")]
    assert not any(" " in reply for reply in replies)


def test_a_heading_is_no_part_of_the_sentence_below_it():
    lines = "It rained upon the hills that day.\nNobody of the house was out in it, and the dogs slept.\n" * 60
    text = lines + "\nCHAPTER LVI. Ariadne\n\nMy lord had a house in the square.\n" + lines
    assert "CHAPTER LVI. Ariadne" in [text[a:b] for a, b in paragraphs(text)]
    assert not any("\n" in text[a:b] for a, b in paragraphs(text))
    text = (
        "　　◇隐公十一年\n　　【经】十有一年春，滕侯、薛侯来朝。夏，公会郑伯于时来。秋七月壬午，公及齐侯入许。\n" * 40
    )
    assert not any("◇" in found.question for found in find_chinese(text, "春秋左传"))


def test_abbreviations_end_no_paragraph_and_comments_are_no_text(tmp_path):
    text = "It rained upon the hills that day, and Mr.\nMonk was out in it.\nNobody knew.\n" * 40
    assert all(text[a:b].startswith(("It", "Nobody")) for a, b in paragraphs(text))
    (tmp_path / "a.md").write_text("# One\n<!-- END -->\nTwo <!-- kept --> three\n")
    assert next(read_source(SourceConfig("a", "a.md"), tmp_path, Skipped())).text == "# One\nTwo <!-- kept --> three\n"


def test_a_collection_of_rows_without_titles(tmp_path):
    tokenizer_folder(tmp_path / "tok")
    write_jsonl(tmp_path / "web.jsonl", [{"text": novel(i, 12)} for i in range(12)])
    write_pool(tmp_path, [SourceConfig("web", "web.jsonl")], tmp_path, lambda *_: True)
    web = make_context(tmp_path, load_vocabulary(str(tmp_path / "tok")))
    item = json.loads(build_one(web, spec("multi_doc_qa", "en", 4_000), 20, None).line)
    titles = [shown["title"] for shown in item["documents"]]
    assert len(titles) == len(set(titles)) > 2


def test_what_is_left_out_is_marked(context):
    for task, language in (("single_doc_qa", "en"), ("single_doc_qa", "zh"), ("multi_doc_qa", "zh")):
        for index in range(6):
            line = build_one(context, spec(task, language, 5_000, index), 30, None).line
            item = json.loads(line or "null")
            for shown in item["documents"] if item else ():
                before = item["messages"][0]["content"][: shown["start"]].rstrip("\n").rpartition("\n")[2]
                assert (shown["origin"] > 0) == (before in ("[…]", "（上略）", "# […]"))
