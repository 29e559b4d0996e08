"""Conversations about invented annual reports, as `longverse ask` holds them: what smol's recipe learns reports from.

    python recipes/smol_reports.py build/smol-reports.jsonl
    python recipes/smol_reports.py build/smol-reports-much.jsonl --scale 5 --questions 48

Half of the questions are put in other words than the report's (REWORDED): people do not know what words it uses. The
rewordings that benchmarks/citations.py asks with are none of them; three of those stand among the other data's facts.
The reports are those of `longverse demo`, from seeds that neither it nor any benchmark uses (5,000 and up): names and
facts are others, the templates are the same. So reports measure what smol does in a field it knows; kinds of fact that
it never saw are measured by benchmarks/smol_facts.py.
"""

import argparse
import json
import random
import re
from pathlib import Path

from longverse.data.long_sft.prompts import variants
from longverse.documents.report import generate_report, unanswerable
from longverse.models.shards import replacing
from longverse.wording import asked, messages

FIRST_SEED = 5_000
# From, to (words), reports; 21,000 words are 32K tokens.
WORDS = {
    "en": ((500, 1_200, 90), (1_200, 2_700, 70), (2_700, 5_400, 40), (5_400, 10_500, 28), (10_500, 21_000, 12)),
}
WORDS["zh"] = tuple((low * 10 // 11, high * 10 // 11, count * 4 // 5) for low, high, count in WORDS["en"])
UNANSWERABLE = 0.25

# What follows "the" in a question of the report's kind, and how else it may be asked; {} is what it is asked about.
NOUNS = {
    "chair": ("Who leads the board of {}?", "Who sits at the head of the board of {}?"),
    "head office": ("Where does {} have its headquarters?", "Which place houses the headquarters of {}?"),
    "logo": ("What does the emblem of {} show?", "By which sign is {} known?"),
    "manager": ("Who runs {}?", "Under whom does {} work?", "Who manages {}?"),
    "number of workers": ("How large is the workforce of {}?", "How many hands does {} employ?"),
    "leader": ("Who leads {}?", "Who is responsible for {}?", "In whose hands is {}?"),
    "budget": ("How much may {} spend?", "What is {} allowed to cost?"),
    "base": ("Where is {} based?", "From where is {} run?"),
    "director": ("Who directs {}?", "Who is in charge of {}?"),
    "number of patents": ("How many patents does {} hold?", "How many patents came out of {}?"),
    "yearly cost": ("What does {} cost every year?", "How much money does {} take in a year?"),
    "captain": ("Under whose command is {}?", "Who steers {}?"),
    "home port": ("Where is {} registered?", "To which harbour does {} come home?"),
    "capital": ("How much money does {} hold?", "How rich is {}?"),
    "treasurer": ("Who looks after the money of {}?", "Who keeps the accounts of {}?"),
    "main subject": ("What does {} teach above all?", "What do pupils learn at {}?"),
    "number of pupils": ("How big is {}?", "How many young people go to {}?"),
    "head teacher": ("Who heads {}?", "Who is in charge at {}?"),
    "building": ("Where does {} stand?", "In which town is {}?"),
    "area": ("How large is {}?", "How many hectares does {} cover?"),
    "farmer": ("Who works the land of {}?", "By whom is {} farmed?"),
    "purchase": ("Since when has {} belonged to the group?", "In which month was {} bought?"),
    "source of heat": ("How is {} heated?", "What keeps {} warm?"),
    "number of loading doors": ("How many doors for lorries does {} have?", "At how many doors is {} loaded?"),
    "keeper": ("Who keeps {}?", "Who holds the keys of {}?"),
    "price": ("How much must one pay for {}?", "For how much does {} sell?"),
    "launch": ("When did {} come out?", "Since when has {} been on the market?"),
    "curator": ("Who is responsible for the exhibits of {}?", "Who hangs the pictures in {}?"),
    "most famous piece": ("What is the best known exhibit of {}?", "What do visitors come to {} for?"),
    "number of paintings": ("How many pictures hang in {}?", "How many canvases does {} own?"),
    "number of rooms": ("How many rooms does {} let?", "How many rooms are there in {}?"),
    "owner": ("Whose property is {}?", "Who owns {}?"),
    "depth": ("How deep is {}?", "How far down does {} go?"),
    "foreman": ("Who gives the orders at {}?", "Who supervises the men of {}?"),
    "length": ("How long is {}?", "How many kilometres does {} run?"),
    "chief engineer": ("Who is the head of engineering at {}?", "Which engineer is over all others at {}?"),
    "last station": ("Where does {} end?", "At which stop must everybody leave {}?"),
    "colour": ("How is {} painted?", "What colour are the carriages of {}?"),
    "editor": ("Who edits {}?", "Who is responsible for the pages of {}?"),
    "number of subscribers": ("How many people subscribe to {}?", "How many households take {}?"),
    "architect": ("Who drew {}?", "Who planned {}?"),
    "span": ("How far does {} reach?", "How wide is the gap that {} crosses?"),
    "inauguration": ("When was {} opened?", "Since when may people cross {}?"),
    "speciality": ("What should one buy at {}?", "What does {} bake better than others?"),
    "master baker": ("Who bakes at {}?", "Who stands at the oven of {}?"),
    "daily output": ("How many loaves does {} bake a day?", "How much bread leaves {} every day?"),
    "sign": ("What hangs over the door of {}?", "What is shown above the entrance of {}?"),
    "number of members": ("How many musicians play in {}?", "How many people make music in {}?"),
    "rehearsal hall": ("Where does {} practise?", "In which town does {} rehearse?"),
    "auditor": ("Which firm audits {}?", "Who went through the accounts of {}?"),
    "next annual meeting": ("When do the owners of {} meet next?", "When will {} gather its shareholders?"),
}  # fmt: skip
REWORDED: list[tuple[str, tuple[str, ...]]] = [
    (rf"(?:Who|What|Where|When|Which firm) (?:is|was) the {noun} of (.*)\?", variants_)
    for noun, variants_ in NOUNS.items()
]
REWORDED += [
    (r"What does (the .* farm) grow\?", ("What is harvested at {}?", "What comes from the fields of {}?")),
    (
        r"What was the cost of repairing (.*)\?",
        ("What did it cost to mend {}?", "How much was spent on putting {} right?"),
    ),
    (
        r"What is the dome of (.*) made of\?",
        ("From which material is the dome of {}?", "Of what did they build the dome of {}?"),
    ),
    (
        r"How much did the audit of (.*) cost\?",
        ("How much did {} spend on its audit?", "What was the price of the audit of {}?"),
    ),
    (r"(.*)的董事长是谁？", ("谁主持{}的董事会？", "谁是{}董事会的负责人？")),
    (r"(.*)的总部设在哪里？", ("{}的总公司在什么地方？", "{}从哪里管理业务？")),
    (r"(.*工厂)的厂长是谁？", ("谁管理{}？", "{}由谁领导？")),
    (r"(.*工厂)生产什么？", ("{}做的是什么产品？", "{}出产什么？")),
    (r"(.*工厂)有多少员工？", ("在{}做工的有多少人？", "{}雇了多少人？")),
    (r"(.*工厂)是什么时候投产的？", ("{}从什么时候开始生产？", "{}哪个月开工？")),
    (r"(.*项目)由谁负责？", ("谁领导{}？", "{}归谁管？")),
    (r"(.*项目)的预算是多少？", ("{}能花多少钱？", "给{}拨了多少钱？")),
    (r"(.*项目)设在哪里？", ("{}在什么地方进行？", "{}落户何处？")),
    (r"(.*项目)将于什么时候结束？", ("{}做到什么时候为止？", "{}哪个月收尾？")),
    (r"(货轮.*号)的船长是谁？", ("谁指挥{}？", "{}由谁驾驶？")),
    (r"(货轮.*号)运送什么？", ("{}装的是什么货？", "{}载着什么？")),
    (r"(货轮.*号)的母港是哪里？", ("{}停靠在哪个港口？", "{}回到哪个港？")),
    (r"(货轮.*号)的船身漆成什么颜色？", ("{}是什么颜色的？", "{}船身涂的是什么颜色？")),
    (r"(.*农场)种植什么？", ("{}的地里长的是什么？", "{}收获什么？")),
    (r"(.*农场)占地多少公顷？", ("{}有多大？", "{}的面积是多少公顷？")),
    (r"(.*农场)由谁管理？", ("谁照看{}？", "{}的负责人是谁？")),
    (r"(.*农场)是什么时候买下的？", ("{}是哪个月买进的？", "公司什么时候得到{}？")),
    (r"(.*学校)教授什么？", ("{}的学生学什么？", "{}开的是什么课？")),
    (r"(.*学校)有多少名学生？", ("在{}读书的有多少人？", "{}有多大规模？")),
    (r"(.*学校)的校长是谁？", ("谁主管{}？", "{}由谁领导？")),
    (r"(.*学校)位于哪里？", ("{}在什么地方？", "{}建在哪里？")),
    (r"(.*基金)捐出多少？", ("{}拿出了多少钱？", "{}捐了多少钱？")),
    (r"(.*基金)出资建了什么？", ("{}的钱用来修了什么？", "{}出钱造了什么？")),
    (r"(.*基金)的司库是谁？", ("谁管{}的钱？", "{}的账由谁管？")),
    (r"(.*基金)成立于什么时候？", ("{}是哪个月设立的？", "{}从什么时候开始有的？")),
    (r"(.*面包房)以什么闻名？", ("到{}应该买什么？", "{}最有名的是什么？")),
    (r"(.*面包房)的主厨是谁？", ("{}由谁掌勺？", "谁在{}烤面包？")),
    (r"(.*面包房)每天卖出多少个面包？", ("{}一天能卖多少面包？", "{}每日卖几个面包？")),
    (r"(.*)的审计机构是哪家？", ("哪家机构审计{}？", "谁查{}的账？")),
    (r"(.*)的审计费用是多少？", ("{}审计花了多少钱？", "{}为审计付了多少？")),
    (r"(.*)的下一次年会在什么时候召开？", ("{}下次什么时候开年会？", "{}的年会定在哪个月？")),
]


def reworded(question: str, rng: random.Random) -> str:
    """The question in other words, where some are known."""
    for pattern, ways in REWORDED:
        if (match := re.fullmatch(pattern, question)) is not None:
            text = rng.choice(ways).replace("{}", match[1])
            return text[:1].upper() + text[1:]
    return question


def conversation(seed: int, words: int, language: str, most: int) -> list[dict[str, str]]:
    """One report, a question for every 130 words and at most `most`; one in four has no answer there."""
    rng = random.Random(seed)
    wanted = min(most, max(4, words // 130))
    without = round(wanted * UNANSWERABLE)
    absent = unanswerable(generate_report(seed, target_words=words, questions=1, language=language), without, seed)
    report = generate_report(seed, target_words=words, questions=wanted - len(absent), language=language)
    turns = [(fact.question, fact.sentence) for fact in report.facts]
    turns += [(question, variants("not_stated", language)[0]) for question in absent]
    turns = [(reworded(question, rng) if rng.random() < 0.5 else question, answer) for question, answer in turns]
    rng.shuffle(turns)
    talk = messages(report.text, turns[0][0])
    for number, (question, answer) in enumerate(turns):
        if number:
            talk.append({"role": "user", "content": asked(question)})
        talk.append({"role": "assistant", "content": answer})
    return talk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--scale", type=float, default=1, help="how many times the reports of WORDS")
    parser.add_argument("--questions", type=int, default=36, help="at most so many a report")
    options = parser.parse_args()
    rng = random.Random(7)
    seed = FIRST_SEED
    lines = []
    for language, buckets in WORDS.items():
        for low, high, count in buckets:
            for _ in range(round(count * options.scale)):
                talk = conversation(seed, rng.randint(low, high), language, options.questions)
                lines.append(json.dumps({"messages": talk}, ensure_ascii=False))
                seed += 1
    rng.shuffle(lines)
    options.target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.target) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
