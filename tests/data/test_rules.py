"""The offline rules: what they find is true, and what would be ambiguous or false is left out."""

import re

import pytest

from longverse.data.config import build
from longverse.data.long_sft.builder import build_one, make_context
from longverse.data.long_sft.context import Spec
from longverse.data.long_sft.few_shot import _draft as few_shot_draft
from longverse.data.long_sft.few_shot import few_shot
from longverse.data.long_sft.offline_code import find_code
from longverse.data.long_sft.offline_zh import find_chinese
from longverse.data.long_sft.pool import write_pool
from longverse.data.long_sft.summary import summary
from longverse.data.sources import SourceConfig
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


@pytest.mark.parametrize("language", ["en", "zh"])
def test_summaries_cover_what_is_shown(context, language):
    reached = []
    for index in range(12):
        built = build_one(context, spec("summary", language, 5_000, index), 30, None)
        draft = summary(context, spec("summary", language, 5_000, index)) if built.attempt == 0 else None
        if draft is not None and draft.kind == "key_sentences":
            starts = draft.claims[-1].end / len(draft.parts[0].text)
            reached.append(starts)
            size = len(draft.parts[0].text) / len(draft.claims)
            for number, claim in enumerate(draft.claims):  # each sentence stands in its own equal part of what is shown
                assert (number - 0.15) * size <= claim.start < (number + 1.3) * size
    assert reached
