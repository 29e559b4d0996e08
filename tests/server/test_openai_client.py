"""OpenAI's own client against a running server: what it gets is what the engine says."""

import io
import json
import threading
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from pydantic import BaseModel

from longverse.documents import ask
from longverse.documents.reader import Document, decode
from longverse.inference import engine as engine_module
from longverse.inference.engine import Engine
from longverse.inference.sampling import Sampling
from longverse.server.sessions import planned_length
from tests.server.common import Running, wait_for

HELLO: list[Any] = [{"role": "user", "content": "Hello there, 中文!"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=200)


def engine_says(engine: Engine, messages: list[Any], **settings: Any) -> tuple[str, str, list[int]]:
    ids = engine.chat.encode(messages)
    sampling = Sampling(**{"max_new_tokens": 24, **settings})
    session = engine.session(planned_length(len(ids) + sampling.max_new_tokens, engine.window))
    done = session.complete(ids, sampling)
    return done.text, done.stats.finish_reason, ids


def test_models(server: Running, client: OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.max_model_len) == ("tiny", "model", 2048)  # type: ignore[attr-defined]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"temperature": 0.9, "seed": 5, "top_p": 0.8}, {"temperature": 0.9, "seed": 5, "top_p": 0.8}),
        (
            {"presence_penalty": 1.5, "frequency_penalty": 0.5, "max_completion_tokens": 30},
            {"presence_penalty": 1.5, "frequency_penalty": 0.5, "max_new_tokens": 30},
        ),
        (
            {"temperature": 1.0, "seed": 2, "extra_body": {"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2}},
            {"temperature": 1.0, "seed": 2, "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2},
        ),
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_the_engines(
    client: OpenAI, engine: Engine, theirs: dict[str, Any], ours: dict[str, Any], stream: bool
) -> None:
    text, reason, ids = engine_says(engine, HELLO, **ours)
    if stream:
        options: Any = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options=options, **theirs)
        )
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        assert reasons[-1] == reason
        assert not any(reasons[:-1])
        assert chunks[0].choices[0].delta.role == "assistant"
        assert len({chunk.id for chunk in chunks}) == 1
        usage = chunks[-1].usage
    else:
        done = client.chat.completions.create(model="tiny", messages=HELLO, **theirs)
        said, usage = done.choices[0].message.content, done.usage
        assert done.choices[0].finish_reason == reason
        assert done.timings["predicted_n"] == usage.completion_tokens  # type: ignore[attr-defined,union-attr]
    assert said == text
    assert usage is not None
    assert usage.prompt_tokens == len(ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_conversation_reuses_what_was_read(client: OpenAI, engine: Engine) -> None:
    messages: list[Any] = [{"role": "developer", "content": "Be brief. " * 60}, *HELLO]
    first = client.chat.completions.create(model="tiny", messages=messages)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "On."}]
    second = client.chat.completions.create(model="tiny", messages=messages)
    system = [{**messages[0], "role": "system"}]
    assert second.choices[0].message.content == engine_says(engine, [*system, *messages[1:]])[0]
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) > 300  # more than what is not worth waiting for


def test_stop_texts_end_an_answer(client: OpenAI, engine: Engine) -> None:
    text = engine_says(engine, HELLO)[0]
    stop = text[6:8]
    done = client.chat.completions.create(model="tiny", messages=HELLO, stop=[stop, "never"])
    assert done.choices[0].message.content == text[: text.index(stop)]
    assert done.choices[0].finish_reason == "stop"


def test_several_choices_draw_with_their_own_seeds(client: OpenAI, engine: Engine) -> None:
    done = client.chat.completions.create(model="tiny", messages=HELLO, n=3, temperature=1, seed=7)
    for choice in done.choices:
        expected = engine_says(engine, HELLO, temperature=1.0, seed=7 + choice.index)[0]
        assert choice.message.content == expected
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, n=3, temperature=1, seed=7, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in done.choices]


def test_log_probabilities_are_the_networks(client: OpenAI, engine: Engine) -> None:
    done = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, temperature=0.7, seed=1, max_tokens=8
    )
    log = done.choices[0].logprobs
    assert log is not None
    assert log.content is not None
    ids = engine.chat.encode(HELLO)
    vocabulary = {engine.tokenizer.token_bytes(n): n for n in range(270)}
    spelled = b"".join(bytes(row.bytes or []) for row in log.content).decode("utf-8", "replace")
    assert spelled.startswith(done.choices[0].message.content or "?")  # less half a character at its end
    for row in log.content:
        with torch.inference_mode():  # one shot, with no cache and no chunks
            positions = torch.arange(len(ids))[None]
            logits = engine.network(torch.tensor([ids]), positions, 2048, logits_to_keep=1)[0, -1]
        shares = logits.float().log_softmax(-1)
        token = vocabulary[bytes(row.bytes or [])]
        assert row.logprob == pytest.approx(float(shares[token]), abs=1e-3)
        best = shares.topk(3).values.tolist()
        assert [top.logprob for top in row.top_logprobs] == pytest.approx(best, abs=1e-3)
        ids.append(token)
    rows = []
    for chunk in client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, temperature=0.7, seed=1, max_tokens=8, stream=True
    ):
        if chunk.choices[0].logprobs:
            rows += chunk.choices[0].logprobs.content or []
    assert [(row.bytes, row.logprob) for row in rows] == [(row.bytes, row.logprob) for row in log.content]


def test_json_mode(client: OpenAI) -> None:
    for seed in range(3):
        done = client.chat.completions.create(
            model="tiny", messages=HELLO, response_format={"type": "json_object"}, temperature=1.3, seed=seed,
            max_tokens=20 + 20 * seed,
        )  # fmt: skip
        assert isinstance(json.loads(done.choices[0].message.content or ""), dict)
    with pytest.raises(openai.BadRequestError, match="its form alone takes 2"):
        client.chat.completions.create(
            model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=1
        )


class Verdict(BaseModel):
    guilty: bool
    reasons: list[str]
    years: int | None


def test_json_of_a_schema(client: OpenAI) -> None:
    for seed in range(3):
        done = client.chat.completions.parse(
            model="tiny", messages=HELLO, response_format=Verdict, temperature=1.3, seed=seed, max_tokens=80
        )
        assert isinstance(done.choices[0].message.parsed, Verdict)
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "oneOf": []}}}
    with pytest.raises(openai.BadRequestError, match="'oneOf', which is not supported"):
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=wrong)
    with pytest.raises(openai.BadRequestError, match="that type needs it"):
        client.chat.completions.create(model="tiny", messages=HELLO, response_format={"type": "json_schema"})  # type: ignore[typeddict-item]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_calls_of_functions_and_their_results(client: OpenAI, stream: bool, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": HELLO, "tools": [WEATHER], "tool_choice": choice, "temperature": 1, "seed": 3,
        "max_tokens": 120,
    }  # fmt: skip
    if stream:
        calls: list[Any] = []
        reasons = []
        for chunk in client.chat.completions.create(stream=True, **asked):
            calls += chunk.choices[0].delta.tool_calls or []
            reasons.append(chunk.choices[0].finish_reason)
        assert reasons[-1] == "tool_calls"
    else:
        done = client.chat.completions.create(**asked)
        calls = list(done.choices[0].message.tool_calls or [])
        assert done.choices[0].message.content is None
        assert done.choices[0].finish_reason == "tool_calls"
    (call,) = calls
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments), dict)
    record = {"id": call.id, "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    followed = client.chat.completions.create(
        model="tiny", tools=[WEATHER], tool_choice="none",
        messages=[*HELLO, {"role": "assistant", "tool_calls": [record]},  # type: ignore[list-item]
                  {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}],
    )  # fmt: skip
    assert followed.choices[0].finish_reason in ("stop", "length")


def test_the_model_reads_the_tools_and_its_own_calls(server: Running) -> None:
    from longverse.server.prompts import Prompts
    from longverse.server.schemas import ChatRequest

    record = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    request = ChatRequest.model_validate(
        {"model": "tiny", "tools": [WEATHER], "messages": [
            *HELLO, {"role": "assistant", "tool_calls": [record]}, {"role": "tool", "content": "22 degrees"}]}
    )  # fmt: skip
    prompt = server.engine.tokenizer.decode(
        Prompts(server.engine, server.library).chat(request).ids, skip_special=False
    )
    for text in (
        '"description": "The weather of a city"', "<|im_start|>tool\n22 degrees<|im_end|>",
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    ):  # fmt: skip
        assert text in prompt


def test_completions(client: OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer.encode("Once upon")
    expected = engine.session(2048).complete(ids, Sampling(max_new_tokens=9))
    for prompt in ("Once upon", ids):
        done = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, logprobs=2)
        assert done.choices[0].text == expected.text
        log = done.choices[0].logprobs
        assert log is not None
        assert len(log.token_logprobs or []) == len(log.tokens or []) == len(log.text_offset or []) == 9
        assert all(len(top) == 2 for top in log.top_logprobs or [])
    both = client.completions.create(model="tiny", prompt=["Once upon", "A"], max_tokens=9, n=2, echo=True)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == "Once upon" + expected.text
    assert both.usage is not None
    assert both.usage.completion_tokens == 36
    text = ""
    for chunk in client.completions.create(model="tiny", prompt="Once upon", max_tokens=9, stream=True, echo=True):
        text += chunk.choices[0].text
    assert text == "Once upon" + expected.text


def test_progress_of_reading_in_the_stream(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CHUNK", 512)
    long: list[Any] = [{"role": "user", "content": "word " * 320}]
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=long, stream=True, max_tokens=2, extra_body={"return_progress": True}
        )
    )
    progress = [chunk.prompt_progress for chunk in chunks if hasattr(chunk, "prompt_progress")]
    assert len(progress) >= 4
    assert [p["processed"] for p in progress] == sorted({p["processed"] for p in progress})
    assert progress[-1]["processed"] == progress[-1]["total"] > 1500
    assert all(set(p) == {"total", "cache", "processed", "time_ms"} for p in progress)
    timings = chunks[-1].timings  # type: ignore[attr-defined]
    assert timings["cache_n"] + timings["prompt_n"] == progress[-1]["total"]


def test_errors_are_openais(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"This prompt has [\d,]+ tokens and tiny reads 2,048") as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 3000}])
    assert caught.value.code == "context_length_exceeded"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["n_ctx"] == 2048
    assert caught.value.body["n_prompt_tokens"] > 2048
    with pytest.raises(openai.BadRequestError, match=r"with 1,000,000 for the answer .* reads 2,048"):
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=10**6)
    with pytest.raises(openai.BadRequestError, match="temprature is not known; did you mean temperature"):
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"temprature": 1})
    with pytest.raises(openai.BadRequestError, match="field n is wrong"):
        client.chat.completions.create(model="tiny", messages=HELLO, n=10**9)
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.chat.completions.create(model="tiny", messages=HELLO, logit_bias={"5": 3})
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    with pytest.raises(openai.NotFoundError, match="no file"):
        client.files.retrieve("file-000000000000000000000000")


# ---- documents ------------------------------------------------------------------------------------------

REPORT = "# The mill\n\nThe mill stands in Ost.\n\nIt was built by Ada Rell in 1871.\n\n水车在东村。\n"


def with_file(*identities: str, question: str) -> list[Any]:
    parts: list[Any] = [{"type": "file", "file": {"file_id": identity}} for identity in identities]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def asked(engine: Engine, documents: list[Document], question: str, new: int) -> tuple[str, Any, list[int]]:
    """What `longverse ask` does: the text it gives out, the citations, and the prompt."""
    prompts = ask.prepare(engine, documents, [question], new)
    session = engine.session(2048)
    done = session.complete(prompts.ids[0], Sampling(max_new_tokens=new, stop=("\n\n",)))
    cited = ask.cited(session, prompts, 0, done.text.lstrip(), done.tokens)
    return cited.answer if cited.found else ask.not_found(prompts, 0), cited, prompts.ids[0]


def test_a_document_is_uploaded_read_and_asked(server: Running, client: OpenAI, engine: Engine) -> None:
    stored = client.files.create(file=("mill.md", io.BytesIO(REPORT.encode())), purpose="user_data")
    about: dict[str, Any] = stored.document  # type: ignore[attr-defined]
    assert (stored.filename, stored.bytes, about["title"]) == ("mill.md", len(REPORT.encode()), "The mill")
    assert about["tokens"] == len(engine.tokenizer.encode(REPORT))
    assert about["fits"] is True
    assert about["read"] is False
    document = decode(REPORT.encode(), "mill.md")
    for number, question in enumerate(["Who built it?", "Where does the mill stand?", "何时？"]):
        messages = with_file(stored.id, question=question)
        done = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
        text, cited, ids = asked(engine, [document], question, 12)
        message: Any = done.choices[0].message
        assert message.content == message.cited["answer"] == text
        assert message.cited["found"] is cited.found
        shown = cited.citations if cited.found else ()
        for got, expected in zip(message.cited["citations"], shown, strict=True):
            assert got["file_id"] == stored.id
            assert got["cited_text"] == REPORT[got["start_char_index"] : got["end_char_index"]] == expected.text
        assert done.usage is not None
        assert done.usage.prompt_tokens == len(ids)
        assert done.usage.prompt_tokens_details is not None
        if number:
            assert (done.usage.prompt_tokens_details.cached_tokens or 0) > len(engine.tokenizer.encode(REPORT))
        raw = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, extra_body={"cite": "off"})
        assert raw.choices[0].message.content == engine.session(2048).complete(ids, Sampling(max_new_tokens=12)).text
    assert client.files.retrieve(stored.id).document["read"] is True  # type: ignore[attr-defined]
    assert next(iter(client.files.list())).id == stored.id
    assert client.files.content(stored.id).read() == REPORT.encode()
    assert client.files.delete(stored.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tiny", messages=with_file(stored.id, question="Who?"))


def test_a_streamed_answer_ends_with_its_citations(client: OpenAI, engine: Engine) -> None:
    other = "The bridge was built by Bo Finn.\n"
    files = [
        client.files.create(file=(name, text.encode()), purpose="user_data")
        for name, text in (("mill.md", REPORT), ("bridge.txt", other))
    ]
    documents = [decode(REPORT.encode(), "mill.md"), decode(other.encode(), "bridge.txt")]
    for question in ("Who built the mill?", "Who is Zed Quorl?"):
        text, cited, _ = asked(engine, documents, question, 12)
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=with_file(*(f.id for f in files), question=question), max_tokens=12, stream=True
            )
        )
        last: Any = chunks[-1].choices[0].delta
        assert last.cited["answer"] == text
        assert last.cited["found"] is cited.found
        shown = [files[citation.document].id for citation in cited.citations] if cited.found else []
        assert [citation["file_id"] for citation in last.cited["citations"]] == shown
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert said.endswith(text.rstrip())


def test_reading_ahead_streams_progress_and_the_question_finds_it_read(server: Running, client: OpenAI) -> None:
    text = "\n\n".join(f"Paragraph {n} says {n * n}." for n in range(60))
    stored = client.files.create(file=("long.txt", text.encode()), purpose="user_data")
    with client._client.stream("POST", f"{server.url}/v1/files/{stored.id}/read") as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    progress = [event["prompt_progress"] for event in events[:-1]]
    assert progress[-1]["processed"] == progress[-1]["total"]
    assert events[-1]["status"] == "ready"
    assert events[-1]["file"]["document"]["read"] is True
    done = client.chat.completions.create(model="tiny", messages=with_file(stored.id, question="What?"), max_tokens=2)
    assert done.usage is not None
    assert done.usage.prompt_tokens_details is not None
    assert done.usage.prompt_tokens_details.cached_tokens == progress[-1]["total"]
    page = client._client.get(f"{server.url}/v1/files/{stored.id}/paragraphs?first=11&count=5").json()
    assert [row["number"] for row in page["data"]] == [11, 12, 13, 14, 15]
    assert page["total"] == 60
    for row in page["data"]:
        assert text[row["start"] : row["end"]] == row["text"]
    near = client._client.get(f"{server.url}/v1/files/{stored.id}/paragraphs?at={page['data'][2]['start']}").json()
    assert 13 in [row["number"] for row in near["data"]]


def test_the_library_outlives_the_server(server: Running, client: OpenAI) -> None:
    from longverse.server.library import Library

    stored = client.files.create(file=("mill.md", REPORT.encode()), purpose="assistants")
    again = Library(server.library.folder, len)
    assert again.get(stored.id) == server.library.get(stored.id)
    assert again.document(stored.id) == server.library.document(stored.id)
    assert again.document(stored.id).text == REPORT


# ---- many and impatient ---------------------------------------------------------------------------------


def test_no_answer_is_mixed_up_among_many_clients(client: OpenAI, engine: Engine) -> None:
    questions = [[{"role": "user", "content": f"Question {n}: " + "why? " * (1 + 37 * n % 90)}] for n in range(12)]
    answers: dict[int, str] = {}

    def go(number: int) -> None:
        text = ""
        for chunk in client.chat.completions.create(
            model="tiny",
            messages=questions[number],
            stream=True,
            max_tokens=8,  # type: ignore[arg-type]
        ):
            text += chunk.choices[0].delta.content or ""
        answers[number] = text

    threads = [threading.Thread(target=go, args=(n,)) for n in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, messages in enumerate(questions):
        assert answers[number] == engine_says(engine, messages, max_new_tokens=8)[0]


def test_a_closed_stream_stops_the_work(server: Running, client: OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, max_tokens=1900)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    assert server.worker.active
    stream.close()
    wait_for(lambda: not server.worker.active, 10)
