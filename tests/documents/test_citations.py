"""Citations give back their exact text, are checked against it, and what is not in a document is said to be absent."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longverse.documents.citations import Attended, Cited, cite, match_quote, without_references
from longverse.documents.reader import Document, decode
from longverse.documents.report import generate_report, unanswerable
from longverse.documents.words import (
    Index,
    can_answer,
    groups,
    has_another_name,
    marked_names,
    names,
    sentences,
    terms,
)

CURATOR = "The curator of the Denton museum is Delia Mitchell"
WHO = "Who is the curator of the Denton museum?"
TEXT = """# The Upton report

## The Denton museum

The curator of the Denton museum is Delia Mitchell. It was built in 1,240 days. Visitors like the café.

## The ship Rigel

The Rigel sailed in March. Her crew of 41 was paid on time, and nobody was hurt.

The engine was repaired at a cost of 3.5 million crowns.

## 青溪工厂

青溪工厂的厂长是王嘉林。员工共有412人，产值增长百分之八。
"""


@pytest.fixture(scope="module")
def document() -> Document:
    return decode(TEXT.encode(), "report.md")


@pytest.fixture(scope="module")
def index(document: Document) -> Index:
    return Index([document])


def check(cited: Cited, documents: list[Document]) -> None:
    for citation in cited.citations:
        document = documents[citation.document]
        assert document.text[citation.start : citation.end] == citation.text
        paragraph = document.paragraph_at(citation.start)
        assert paragraph.start <= citation.start < citation.end <= paragraph.end
        assert citation.paragraph == paragraph.number
        record = citation.record()
        assert document.text[record["start_char_index"] : record["end_char_index"]] == record["cited_text"]
    for offset, numbers in cited.marks:
        assert 0 <= offset <= len(cited.answer)
        assert all(1 <= number <= len(cited.citations) for number in numbers)


# ---- words ----------------------------------------------------------------------------------------------------


def test_terms_of_both_languages() -> None:
    assert terms("What are the cities' costs, 1,240 or 3.5%?") == ["city", "cost", "1240", "3.5%"]
    assert terms("青溪的厂长") == ["青溪", "厂长"]
    assert groups("货轮恒达号运送什么？") == [("货轮", "轮恒", "恒达", "达号", "号运", "运送")]
    hull = [("货轮", "轮恒", "恒达", "达号"), ("船身", "身漆", "漆成")]
    assert groups("货轮恒达号的船身漆成什么颜色？") == hull  # "black" says the colour without the word
    assert groups("货轮恒达号的船身漆成何种颜色？") == hull
    for question, kept in (
        ("漆成什么颜色？", ("颜色",)),  # nothing stands beside it
        ("货轮恒达号的船身是什么颜色？", ("颜色",)),  # else its length would do
        ("青溪工厂的员工为什么罢工？", ("罢工",)),
        ("甲公司的租赁合同什么时候签？", ("签",)),
        ("甲公司和乙公司哪家中标？", ("中标",)),
    ):
        assert groups(question)[-1] == kept
    assert groups("Who is the captain?") == [("captain",)]
    assert groups("What is it about?") == []


def test_names_are_numbers_and_capitals_inside_sentences() -> None:
    assert names("Where does Delia Mitchell live since 2019?") == {"delia", "mitchell", "2019"}
    assert names("The curator left.") == set()


@given(st.text(st.sampled_from('ab. A!?\n。！”" 1Mr'), max_size=80))
def test_sentences_lose_nothing_but_white_space(text: str) -> None:
    spans = sentences(text)
    end = 0
    for start, stop in spans:
        assert not text[end:start].strip()
        assert text[start:stop] == text[start:stop].strip() != ""
        end = stop
    assert not text[end:].strip()


def test_sentences_part_where_they_end() -> None:
    text = 'Mr. Smith paid 3.5 crowns. "Why?" he asked. 他走了。“好！”她说。'
    parts = [text[a:b] for a, b in sentences(text)]
    assert parts == ["Mr. Smith paid 3.5 crowns.", '"Why?" he asked.', "他走了。", "“好！”", "她说。"]


# ---- quotes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quote", "status", "found"),
    [
        (CURATOR, "verified", CURATOR),
        ("the CURATOR of  the denton museum is Delia Mitchell!", "verified", CURATOR),
        ("The curator of Denton museum is Delia Mitchel.", "repaired", CURATOR + "."),
        ("Delia", "verified", "Delia"),
        ("Visitors like the cafe\u0301", "verified", "Visitors like the café"),
        ("a sentence about something else entirely", None, None),
        ("24", None, None),
        ("...", None, None),
    ],
)  # fmt: skip
def test_quotes_are_matched(document: Document, quote: str, status: str | None, found: str | None) -> None:
    paragraph = next(p for p in document.paragraphs if "curator" in p.text)
    match = match_quote(quote, paragraph.text)
    assert (match[2] if match else None) == status
    if match:
        assert paragraph.text[match[0] : match[1]] == found


@settings(max_examples=150)
@given(st.data())
def test_any_stretch_of_a_text_is_verified_and_found_where_it_reads_so(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([TEXT.replace("\n", " "), "“Ｆｕｌｌ　ｗｉｄｔｈ”—x…  y\u00a0z ﬁne"]))
    edges = [match.start() for match in re.finditer(r"\b", text)]  # whole words: 24 is not in 1,240
    start, end = sorted(data.draw(st.lists(st.sampled_from(edges), min_size=2, max_size=2, unique=True)))
    quote = text[start:end]
    assume(any(character.isalnum() for character in quote))
    match = match_quote(quote, text)
    assert match is not None
    assert match[2] == "verified"
    plain = quote.strip().strip("\"“”'‘’「」『』").rstrip(".。!！?？,，;；:：…").strip()
    assert text[match[0] : match[1]] == plain


def test_references_are_taken_out_and_kept() -> None:
    answer, references = without_references("It is so [3]. And so【12，14-15】。 Not [x] nor [0].")
    assert answer == "It is so. And so。 Not [x] nor."
    assert references == [(8, [2]), (16, [11, 13, 14]), (len("It is so. And so。 Not [x] nor"), [])]


# ---- citing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer", "status", "found"),
    [
        (WHO, "The curator of the Denton museum is Delia Mitchell.", "verified", True),
        (WHO, "Delia Mitchell", "verified", True),
        (WHO, "The curator of the Denton museum is Ada Baker.", "unverified", True),
        (WHO.replace("Denton", "Fairfax"), CURATOR.replace("Denton", "Fairfax"), "unverified", False),
        ("How large was the crew of the Rigel?", "The crew of the Rigel was 41.", "verified", True),
        ("What was the crew of the Rigel?", "The crew of the Rigel was 14.", "unverified", True),
        ("Who is the captain of the Rigel?", "The captain of the Rigel is Tom.", "unverified", False),
        ("青溪工厂的厂长是谁？", "青溪工厂的厂长是王嘉林。", "verified", True),
        ("青溪工厂有多少员工？", "员工共有412人。", "verified", True),
        ("青溪工厂有多少员工？", "青溪工厂有员工421人。", "unverified", True),
    ],
)  # fmt: skip
def test_answers_are_tied_and_checked(
    document: Document, index: Index, question: str, answer: str, status: str, found: bool
) -> None:
    cited = cite(question, answer, index)
    check(cited, [document])
    assert cited.found is found
    assert cited.citations[0].status == status


def test_a_citation_is_whole_sentences_with_their_place(document: Document, index: Index) -> None:
    cited = cite("Who is the curator of the Denton museum?", "Delia Mitchell", index)
    assert cited.citations[0].text == "The curator of the Denton museum is Delia Mitchell."
    assert cited.citations[0].heading == ("The Upton report", "The Denton museum")
    assert (cited.citations[0].place, cited.citations[0].page) == ("line 5", None)
    assert cited.marked == "Delia Mitchell [1]"
    answer = "The Rigel sailed in March. The engine was repaired at a cost of 3.5 million crowns."
    several = cite("What happened to the Rigel?", answer, index)
    check(several, [document])
    assert several.marked == answer.replace("March.", "March [1].").replace("crowns.", "crowns [2].")


def test_references_decide_where_the_model_gives_them(document: Document, index: Index) -> None:
    place = next(n for n, (_, p) in enumerate(index.places) if "engine" in p.text)
    cited = cite("What did the engine cost?", f"It cost 3.5 million crowns [{place + 1}].", index, numbered=True)
    check(cited, [document])
    assert cited.answer == "It cost 3.5 million crowns."
    assert (cited.citations[0].paragraph, cited.citations[0].status) == (place + 1, "verified")
    # Where they lead nowhere, the words do.
    wrong = cite("What did the engine cost?", "It cost 3.5 million crowns [2].", index, numbered=True)
    assert (wrong.citations[0].paragraph, wrong.citations[0].status) == (place + 1, "verified")
    beyond = cite("What did the engine cost?", "It cost 3.5 million crowns [999].", index, numbered=True)
    assert beyond.citations[0].paragraph == place + 1


def test_attention_chooses_between_paragraphs_that_read_alike() -> None:
    text = "A lamp costs 5 crowns.\n\nA lamp costs 5 crowns.\n\nNothing else is sold."
    document = decode(text.encode(), "a.txt")
    index = Index([document])
    for place in (0, 1):
        attended = Attended([{place: 0.5, 2: 0.1}], [0], -0.1)
        assert (
            cite("What does a lamp cost?", "A lamp costs 5 crowns.", index, attended).citations[0].paragraph
            == place + 1
        )


def test_an_answer_rests_on_no_paragraph_that_the_model_was_not_given() -> None:
    text = "A lamp costs 5 crowns.\n\nA lamp costs 5 crowns.\n\nNothing else is sold."
    index = Index([decode(text.encode(), "a.txt")])
    question, answer = "What does a lamp cost?", "A lamp costs 5 crowns [1]."
    for read in ((1,), (1, 2)):
        for numbered in (True, False):
            cited = cite(question, answer, index, numbered=numbered, read=read)
            assert (cited.found, cited.citations[0].paragraph) == (True, 2)
    assert not cite(question, answer, index, read=(2,)).found
    assert not cite(question, "The text does not say.", index, read=(2,)).found
    assert cite(question, "The text does not say.", index).found


@pytest.mark.parametrize(
    "answer", ["The text does not say.", "the text does not say", "“文中没有提到。”", "文中没有提到"]
)
def test_the_models_own_refusal_is_no_answer(answer: str) -> None:
    index = Index([decode(b"The Sirius lamp of Denton is sold in lime green at the summer fair.", "a.txt")])
    question = "What weight has the Sirius lamp of Denton, sold in lime green at the summer fair?"
    assert cite(question, "It is sold in lime green.", index).found  # most of the words are there
    cited = cite(question, answer, index)
    assert (cited.found, cited.answer) == (False, answer)


def test_other_words_are_accepted_where_the_model_copies_with_attention() -> None:
    document = decode(b"The White Orchestra is conducted by Ada Baker.\n\nIt plays on Sundays.", "a.txt")
    index = Index([document])
    question, answer = "Who waves the baton of the White Orchestra?", "The White Orchestra is conducted by Ada Baker."
    assert cite(question, answer, index, Attended([{0: 0.3}], [0], -0.2)).found
    assert not cite(question, answer, index, Attended([{0: 0.02}], [0], -0.2)).found
    assert not cite(question, answer, index, Attended([{0: 0.3}], [0], -1.2)).found


def test_a_passage_with_the_questions_words_is_shown_where_the_answer_leads_nowhere() -> None:
    first = "Zhao's school is fond of its pupils."  # as near by its words, and without a number
    document = decode(f"{first}\n\nZhao's school has 426 pupils.\n\nThe bakery sells rye.".encode(), "school.txt")
    index = Index([document])
    found = cite("How many pupils has the school of Zhao?", "The text does not say.", index)
    assert (found.found, found.citations[0].text) == (True, "Zhao's school has 426 pupils.")
    assert not cite("How many teachers has the school of Zhao?", "The text does not say.", index).found


@pytest.mark.parametrize(
    ("question", "passage", "can"),
    [
        ("天川项目的预算是多少？", "天川项目由雷子宁负责。", False),
        ("天庆项目的预算是多少？", "天庆项目将于2020年3月结束。", False),
        ("赵氏学校有多少名学生？", "赵氏学校有215名学生。", True),
        ("何氏基金捐出多少？", "何氏基金出资建了一座儿童医院。", False),
        ("何氏基金建了多少座医院？", "何氏基金建了一座医院。", True),
        ("何氏基金捐出多少？", "何氏基金捐出一百万元。", True),
        ("金港工厂有多少员工？", "周末班在十月取消，员工早有此愿。", False),
        ("金港工厂有多少员工？", "金港工厂只有一名员工。", True),
        ("金港工厂有多少员工？", "金港工厂雇了一名员工。", True),
        ("赵氏学校有多少名学生？", "外地学生的比例上升9.1%。", False),
        ("赵氏学校有多少学生？", "外地学生的比例上升9.1个百分点。", False),
        ("赵氏学校有多少学生？", "外地学生上升百分之九。", False),
        ("多少人支持该提案？", "百分之六十二的人支持。", True),
        ("多少种子发芽了？", "85%的种子发芽了。", True),
        ("几家子公司的毛利率分别是多少？", "分别为35%和41%。", True),
        ("这几个项目由谁负责？", "由雷子宁负责。", True),
        ("外地学生上升了多少个百分点？", "外地学生的比例上升9.1%。", True),
        ("外地学生的比例上升多少？", "外地学生的比例上升9.1%。", True),
        ("合同的期限是多少日？", "合同的期限为30日。", True),
        ("罚款多少日元？", "罚款500日元。", True),
        ("罚款多少？", "二月三日起罚款。", False),
        ("松坪农场是什么时候买下的？", "松坪农场由张振平管理。", False),
        ("下一次年会何时召开？", "年会将于2021年5月召开。", True),
        ("How many workers does it have?", "It was opened in March 1987.", False),
        ("How many workers does it have?", "Twelve people work there.", True),
        ("How many pupils are there?", "Their share rose by 9.1 percent.", False),
        ("How many pupils are there?", "Their share rose by nine percent.", False),
        ("How many employees are women?", "62% of the employees are women.", True),
        ("By how many points did it fall?", "It fell by 3.2%.", True),
        ("How much did their share rise?", "Their share rose by 9.1 percent.", True),
        ("How old is she?", "She is in her seventies.", True),
        ("How much does it cost?", "It costs $1.2 million.", True),
        ("How much does it cost?", "The audit was done by Dale and Sons.", False),
        ("When was the farm bought?", "Ann Dale runs the farm.", False),
        ("When was the farm bought?", "The farm was bought in the autumn.", True),
        ("Who runs the farm?", "The farm grows rye.", True),
        ("What is the budget of the school?", "The school has a budget of 4500 crowns.", True),
        ("What is the price of the lamp?", "The lamp was launched in April 2018.", False),
        ("How many pupils are there?", "It opened in the spring of 1987.", False),
    ],
)
def test_a_passage_without_a_number_answers_no_how_many(question: str, passage: str, can: bool) -> None:
    assert can_answer(question, passage) is can


@pytest.mark.parametrize(
    ("question", "answer", "found"),
    [
        ("赵氏学校的校长是谁？", "赵氏学校教授裁缝。", False),  # head teachers are spoken of, of another school
        ("松浦农场种植什么？", "松浦农场种植向日葵。", False),  # another farm's
        ("李氏学校的校长是谁？", "李氏学校教授木工。", True),  # the passage that says it is shown
        ("赵氏学校以什么出名？", "赵氏学校教授裁缝。", True),  # in words that stand nowhere
        ("What is the capital of the Reynolds Fund?", "The treasurer of the Reynolds Fund is Rosa Wood.", False),
        ("What wealth does the Reynolds Fund hold?", "The treasurer of the Reynolds Fund is Rosa Wood.", True),
    ],
)
def test_what_the_documents_say_elsewhere_in_the_questions_words_is_not_said_here(
    question: str, answer: str, found: bool
) -> None:
    sentences = (
        "赵氏学校教授裁缝。", "李氏学校的校长是关明。", "李氏学校教授木工。", "松浦农场占地35公顷。",
        "清坪农场种植向日葵。",
        "The treasurer of the Reynolds Fund is Rosa Wood.", "The capital of the Lambert Fund is 3 million crowns.",
    )  # fmt: skip
    index = Index([decode("\n\n".join(sentences).encode(), "r.md")])
    wanted = next((n for n, sentence in enumerate(sentences) if sentence == answer), 4)
    assert cite(question, answer, index, Attended([{wanted: 0.5}], [0], -0.02)).found is found


def test_common_words_and_the_sentence_before_are_no_strangers() -> None:
    texts = (
        "赵氏学校成立于1950年。校长是关明。", "李氏学校的校长是周平。", "农场种了什么，目前没有人知道。",
        "清坪农场目前种植向日葵。",
    )  # fmt: skip
    index = Index([decode("\n\n".join(texts).encode(), "r.md")])
    for question, answer, place in (
        ("赵氏学校的校长是谁？", "校长是关明。", 0),
        ("清坪农场种植什么？", "清坪农场目前种植向日葵。", 3),
        ("目前清坪农场种植什么作物？", "清坪农场目前种植向日葵。", 3),
    ):
        result = cite(question, answer, index, Attended([{place: 0.5}], [0], -0.02))
        assert result.found
        assert result.citations[0].text == answer


@pytest.mark.parametrize(
    ("question", "passage", "another"),
    [
        ("货轮博丰号的船身漆成什么颜色？", "货轮博辉号的船身漆成浅蓝色。", True),
        ("货轮嘉禾号运送什么？", "货轮启锦号运送茶叶。", True),
        ("学校体育馆何时建成？", "学校图书馆于1990年建成。", True),
        ("货轮博丰号的船身漆成什么颜色？", "货轮博丰号的船身漆成浅蓝色。", False),
        ("货轮博丰号由谁指挥？", "货轮博辉号的姊妹船博丰号由关明指挥。", False),
        ("公司总部设在哪座城市？", "公司总部位于张家港市。", False),
        ("学校的图书馆有多少册书？", "学校图书馆藏书3万册。", False),
        ("目前清坪农场种植什么作物？", "清坪农场目前种植向日葵。", False),
        ("Who is the captain of the Aurora?", "The captain of the Boreas is Ann.", False),  # by names() there
    ],
)
def test_a_chinese_name_with_other_characters_is_another_name(question: str, passage: str, another: bool) -> None:
    assert has_another_name(question, passage) is another


def test_a_passage_about_another_ship_answers_nothing() -> None:
    """The ship that is asked for stands nowhere: none of its words is told elsewhere."""
    said = "货轮博辉号的船身漆成浅蓝色。"
    index = Index([decode(f"{said}\n\n石山农场种植小麦。".encode(), "r.md")])
    for question, found in (("货轮博辉号的船身漆成什么颜色？", True), ("货轮博丰号的船身漆成什么颜色？", False)):
        assert cite(question, said, index, Attended([{0: 0.5}], [0], -0.02)).found is found


@pytest.mark.parametrize(
    ("question", "answer", "place", "found"),
    [
        # Said of it in other words: that others are spoken of in the question's words is no reason to refuse.
        ("When does the bell of the Lime Walk school ring?", "Lessons at the Lime Walk school begin at 8:20.", 0, True),
        # But one that shares nothing with the question but a name is about something else, where others are.
        ("When does the bell of Lime Walk ring?", "Lime Walk was paved in 1850.", 3, False),
        # Nor is one that shares nothing at all, however sure the model copied it,
        ("When does the bell of the Lime Walk school ring?", "At noon the frost had gone.", 0, False),
        # nor one about another one, though the one that is asked for stands near by.
        ("How far is the Lime Walk school from the mill?", "The mill lies 9 miles from the Old Wharf.", 4, False),
        ("How far is the Old Wharf from the mill?", "The mill lies 9 miles from the Old Wharf.", 4, True),
    ],
)
def test_what_is_said_in_other_words(question: str, answer: str, place: int, found: bool) -> None:
    texts = (
        "At noon the frost had gone. Lessons at the Lime Walk school begin at 8:20.",
        "The bell of the Old Wharf school rings at 9:10.",
        "He heard the bell ring in the school of the village.",
        "Lime Walk was paved in 1850.",
        "The mill lies 9 miles from the Old Wharf.",
        "The bell of Garden Walk rings no more.",
    )
    index = Index([decode("\n\n".join(texts).encode(), "r.txt")])
    assert cite(question, answer, index, Attended([{place: 0.7}], [0], -0.02)).found is found


def test_questions_without_words_of_their_own_are_not_refused(index: Index) -> None:
    assert cite("What is it about?", "The curator of the Denton museum is Delia Mitchell.", index).found
    assert not cite("What is it about?", "", index).found


def test_several_documents_are_told_apart() -> None:
    documents = [
        decode(text.encode(), f"{n}.txt") for n, text in enumerate(["Ada lives in Upton.", "Bob lives in Ashby."])
    ]
    cited = cite("Where does Bob live?", "Bob lives in Ashby.", Index(documents))
    check(cited, documents)
    assert (cited.citations[0].document, cited.citations[0].name) == (1, "1.txt")


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["en", "zh"]))
def test_offsets_of_citations_on_generated_reports(seed: int, language: str) -> None:
    report = generate_report(seed, target_words=1500, questions=6, language=language)
    document = decode(report.text.encode(), "report.md")
    index = Index([document])
    for fact in report.facts:
        cited = cite(fact.question, fact.sentence, index)
        check(cited, [document])
        assert cited.found
        assert cited.citations[0].status == "verified"
        assert cited.citations[0].start <= fact.position < cited.citations[0].end
    for question in unanswerable(report, 2, seed):
        check(cite(question, report.facts[0].sentence, index), [document])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_questions_without_an_answer_are_those(language: str) -> None:
    report = generate_report(3, target_words=2500, questions=20, language=language)
    absent = unanswerable(report, 12, 5)
    assert len(set(absent)) == 12
    assert not set(absent) & {fact.question for fact in report.facts}
    assert unanswerable(report, 12, 5) == absent != unanswerable(report, 12, 6)


def test_a_mark_in_the_text_is_no_reference(index: Index, document: Document) -> None:
    place = next(n for n, (_, p) in enumerate(index.places) if "engine" in p.text)
    cited = cite("What did the engine cost?", "It cost 3.5 million crowns. [2]", index)
    assert (cited.citations[0].paragraph, cited.citations[0].status) == (place + 1, "verified")


def test_words_in_quotation_marks_bear_out_themselves_alone() -> None:
    text = 'The novel "The Silent River" was published in 1987.'
    index = Index([decode(text.encode(), "a.txt")])
    question = 'When was "The Silent River" published?'
    for answer, status in (
        ('"The Silent River" was published in 1978.', "unverified"),
        ('"The Silent River" was published in 1987.', "verified"),
        ('“The novel "The Silent River" was published in 1987.”', "verified"),
    ):
        assert cite(question, answer, index).citations[0].status == status, answer
    chinese = Index([decode("小说《静静的河流》讲的是“河边人家的一年四季”，出版于1987年。".encode(), "a.txt")])
    wrong = "“河边人家的一年四季”出版于1978年。"
    assert cite("“河边人家的一年四季”何时出版？", wrong, chinese).citations[0].status == "unverified"


@pytest.mark.parametrize("mark", ["[2024-05-17]", "[2024-05]", "[3-2]", "[1, 2024-05-17]"])
def test_a_date_in_brackets_is_text(mark: str) -> None:
    assert without_references(f"{mark} server restarted.") == (f"{mark} server restarted.", [])
    assert without_references(f"Up [1–2]. {mark} down [3].") == (
        f"Up. {mark} down.", [(2, [0, 1]), (10 + len(mark) - 1, [2])]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("question", "marked"),
    [
        ("名叫黄骠的马每天吃多少斤草料？", {"黄骠"}),
        ("《茶余杂谈》译成了哪种语言？", {"茶余杂谈"}),
        ("从老槐树茶铺到省城，马车要走多少个时辰？", {"老槐树茶铺", "省城"}),
        ("马车从得月楼到省城需要几个时辰？", {"得月楼", "省城"}),
        ("从老槐树茶铺到落霞镇，要走多少里？", {"老槐树茶铺", "落霞镇"}),
        ("“晨星”号是谁造的？", {"晨星"}),
        ("被叫来的人有多少？", set()),
        ("从开始到结束用了多久？", set()),
        ("What is it called?", set()),
    ],
)
def test_names_that_chinese_marks(question: str, marked: set[str]) -> None:
    assert marked_names(question) == marked


@pytest.mark.parametrize("question", ["名叫黄骠的马每天吃多少斤草料？", "从得月楼到省城，马车要走多少个时辰？"])
def test_a_passage_without_the_marked_name_is_about_another(question: str) -> None:
    said = "名叫白驹的马每天吃43斤草料。从醉仙居到省城，马车要走27个时辰。"
    index = Index([decode(f"{said}\n\n石山农场种植小麦。".encode(), "r.md")])
    answer = said[:15] if "马每天" in question else said[15:]
    right = question.replace("黄骠", "白驹").replace("得月楼", "醉仙居")
    for asked, found in ((question, False), (right, True)):
        assert cite(asked, answer, index, Attended([{0: 0.7}], [0], -0.02)).found is found
