from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetuning_kit.formatting import user_text
from finetuning_kit.ledger import DataError, Ledger
try:
    from finetuning_kit.loading import iter_records
except ImportError: iter_records = None
from finetuning_kit.records import Conversation, Document, Feedback, Message, PreferencePair, TrainingSample
from finetuning_kit.settings import FinetuningError, markdown_table
from finetuning_kit.shapes import FORMATS, Format

def as_turns(
    record: TrainingSample,  # one question and its answer
) -> list[Message]:  # a system turn if the sample has a system text, the question with its input, the answer
    "Show a sample as the turns of a conversation"
    start = [Message("system", record.system)] if record.system else []
    return [*start, Message("user", user_text(record)), Message("assistant", record.output)]


def settle_calls(
    messages: list[Message],  # the turns of one conversation
) -> list[Message]:  # the same, with ids call_1, call_2, … and no name that the call says already
    "Number the calls of functions, and let each result say which call it answers"
    settled, by_id, waiting, n_calls = [], {}, [], 0
    for message in messages:
        calls, answered = [], None
        for call in message.tool_calls:
            n_calls += 1
            calls.append(replace(call, id=f"call_{n_calls}"))
            by_id[call.id or calls[-1].id] = calls[-1]
            waiting.append(calls[-1])
        if message.role == "tool":
            named = by_id.get(message.tool_call_id)
            answered = named if message.tool_call_id else waiting[0] if waiting else None
            waiting = [call for call in waiting if call is not answered]
        changes = {"tool_calls": tuple(calls)}
        if answered is not None:
            changes |= {"tool_call_id": answered.id, "name": None if message.name == answered.name else message.name}
        settled.append(replace(message, **changes))
    return settled

def canonical(
    record,  # any record
):  # a conversation, a pair or feedback of messages, or a document
    "Bring a record into the form in which records that say the same are equal"
    if isinstance(record, Document):
        return record
    if isinstance(record, TrainingSample):
        return Conversation(as_turns(record))
    if isinstance(record, Conversation):
        return replace(record, messages=_settled(record.messages))
    prompt = [Message("user", record.prompt)] if isinstance(record.prompt, str) else record.prompt
    sides = {}
    for name in ("chosen", "rejected") if isinstance(record, PreferencePair) else ("completion",):
        side = getattr(record, name)
        whole = _settled([*prompt, *([Message("assistant", side)] if isinstance(side, str) else side)])
        sides |= {"prompt": whole[:len(prompt)], name: whole[len(prompt):]}
    return replace(record, **sides)


def _settled(messages) -> list[Message]:
    plain = [replace(turn, thinking=turn.thinking or None, name=turn.name or None,
                     parts=turn.parts if any(part.weight is not None for part in turn.parts) else ())
             for turn in messages]
    return settle_calls(plain)

def needs_of_turns(
    turns: list[Message],  # a conversation in canonical form
) -> set[str]:  # what a format must be able to hold for it
    "List what a conversation holds besides one question and one answer"
    roles, weights = [turn.role for turn in turns], {turn.weight for turn in turns if turn.weight is not None}
    without = [replace(turn, tool_call_id=None, tool_calls=[replace(call, id=None) for call in turn.tool_calls])
               for turn in turns]
    found = {
        "a system prompt": roles[0] == "system",
        "an empty system turn": any(turn.role == "system" and not turn.content for turn in turns),
        "more than one question and its answer": roles[roles[0] == "system":] != ["user", "assistant"],
        "a conversation without an answer at its end": len(turns) < 2 or roles[-1] != "assistant",
        "tool calls": any(turn.tool_calls for turn in turns),
        "text beside tool calls": any(turn.tool_calls and turn.content for turn in turns),
        "results in another order than their calls": settle_calls(without) != turns,
        "tool results without a call": any(turn.role == "tool" and turn.tool_call_id is None for turn in turns),
        "names of speakers": any(turn.name is not None for turn in turns),
        "thinking": any(turn.thinking for turn in turns),
        "weights": bool(weights),
        "weights other than 0 and 1": bool(weights - {0, 1}),
        "weights of turns that are no answer": any(turn.weight is not None and turn.role != "assistant" for turn in turns),
        "weights of parts": any(turn.parts for turn in turns)}
    return {what for what, is_there in found.items() if is_there}


def needs_of(
    record,  # any record
) -> set[str]:  # such as {"an answer to learn", "a system prompt"}
    "List what a format must be able to hold for a record"
    if isinstance(record, Document):
        return {"text without a prompt"}
    record = canonical(record)
    found = {"tools on offer"} if record.tools else set()
    if isinstance(record, Conversation):
        return found | {"an answer to learn"} | needs_of_turns(record.messages)
    is_pair = isinstance(record, PreferencePair)
    answers = [record.chosen, record.rejected] if is_pair else [record.completion]
    found |= {"a better and a worse answer" if is_pair else "a verdict"}
    found |= {"answers of several turns"} if max(map(len, answers)) > 1 else set()
    found |= {"answers that begin alike"} if is_pair and record.chosen[0] == record.rejected[0] else set()
    return found.union(*(needs_of_turns([*record.prompt, *answer]) for answer in answers))

_TURNS = {"a system prompt", "an empty system turn", "more than one question and its answer", "tools on offer",
          "a conversation without an answer at its end", "tool calls"}
_CHAT = _TURNS | {"text beside tool calls", "results in another order than their calls", "names of speakers",
                  "tool results without a call", "thinking"}
_WEIGHTS = {"weights", "weights other than 0 and 1", "weights of turns that are no answer"}
ORDER = ("a better and a worse answer", "a verdict", "text without a prompt", "an answer to learn", "tool calls",
         "tools on offer", "thinking", "weights of parts", "weights of turns that are no answer",
         "weights other than 0 and 1", "weights", "names of speakers", "text beside tool calls",
         "results in another order than their calls", "tool results without a call", "answers that begin alike",
         "answers of several turns", "more than one question and its answer", "an empty system turn", "a system prompt",
         "a conversation without an answer at its end")
_KINDS = {TrainingSample: "an answer to learn", Conversation: "an answer to learn", Document: "text without a prompt",
          PreferencePair: "a better and a worse answer", Feedback: "a verdict"}


def _carries(shape: Format) -> set[str]:
    name, found = shape.name, {_KINDS[shape.record]}
    is_trl = name.startswith("trl_")
    if shape.record is TrainingSample and "system" in shape.optional.values() and not is_trl:
        return found | {"a system prompt"}
    if shape.holds == "text":
        return found
    if name == "openai":
        return (found | _CHAT | {"weights"}) - {"tool results without a call", "thinking"}
    found |= _TURNS if name.startswith("sharegpt") else _CHAT if is_trl else _CHAT | _WEIGHTS | {"weights of parts"}
    found |= _WEIGHTS | {"tool results without a call"} if name == "sharegpt" else set()
    if shape.record is Conversation:
        return found - {"a conversation without an answer at its end"} if "completion" in shape.columns else found
    found |= {"answers of several turns"} if not name.startswith("sharegpt") else set()
    return found | {"answers that begin alike"} if name != "preference_implicit" else found


CARRIES = {name: _carries(shape) for name, shape in FORMATS.items()}  # format -> what it can hold


def format_named(
    name: str,  # the name of a format, such as "alpaca"
) -> Format:  # its columns and spellings
    "Look a format up, suggesting the nearest name"
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(str(name).lower(), FORMATS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"choose one of {', '.join(FORMATS)}"
    raise DataError("unknown_format", f"there is no format {name!r}; {hint}")


def check_carried(
    record,  # any record
    name: str,  # the name of a format
) -> None:  # nothing where the format can hold the record
    "Refuse a record that would lose something, naming what, and the formats that hold it"
    needed = needs_of(record)
    lost = sorted(needed - CARRIES[format_named(name).name], key=ORDER.index)
    if lost:
        fitting = [other for other, held in CARRIES.items() if needed <= held]
        cure = f"use {_listed(fitting[:3], 'or')}" if fitting else "no format holds all of it"
        raise DataError("not_carried", f"`{name}` cannot carry {_listed(lost[:3], 'or')}; {cure}")


def _listed(words, last) -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else words[0]

def render_turn(
    turn: Message,  # a message
    shape: Format,  # whose spelling is used
) -> dict:  # the turn as a row of the format holds it
    "Write one turn the way a format spells it"
    calls = [_call(call, shape.arguments) for call in turn.tool_calls]
    role = "function_call" if calls and shape.roles else turn.role
    content = [{"type": "text", **part.to_dict()} for part in turn.parts] or turn.content
    if role == "function_call":
        content = [{"name": call.name, "arguments": call.arguments} for call in turn.tool_calls]
        content = json.dumps(content[0] if len(content) == 1 else content, ensure_ascii=False)
    said = {shape.turn["role"]: shape.roles.get(role, role),
            shape.turn["content"]: None if calls and not content and shape.arguments == "text" else content}
    more = {"weight": turn.weight}
    if not shape.roles:
        more |= {"reasoning_content": turn.thinking, "tool_calls": calls or None, "tool_call_id": turn.tool_call_id,
                 "name": turn.name}
    return said | {key: value for key, value in more.items() if value is not None}


def _call(call, arguments) -> dict:
    held = call.arguments if arguments == "object" else json.dumps(call.arguments, ensure_ascii=False)
    return {**({"id": call.id} if call.id else {}), "type": "function",
            "function": {"name": call.name, "arguments": held}}

def render_sample(
    record,  # a sample, or a conversation that is no more than one
    shape: Format,  # of flat columns
) -> dict:  # the row
    "Write one question and its answer in columns"
    written = {} if shape.name.startswith("trl_") else shape.optional
    columns = {name: column for column, name in reversed([*shape.columns.items(), *written.items()])}
    if "instruction" not in shape.columns:
        columns.pop("input", None)  # other tools look for an input beside an instruction only
    if isinstance(record, Conversation):
        *start, asked, answer = record.messages
        record = TrainingSample(asked.content, output=answer.content, system=start[0].content if start else None)
    if record.input and "input" not in columns:
        record = replace(record, instruction=user_text(record), input="")
    given = {name: value for name, value in record.to_dict().items() if value or name in shape.columns.values()}
    given = {"instruction": "", **({"input": ""} if shape.name == "alpaca" else {}), **given}
    return {columns[name]: value for name, value in given.items()}


def render_conversation(
    record,  # a conversation, or a sample
    shape: Format,  # of turns
) -> dict:  # the row
    "Write a conversation in turns"
    messages = record.messages if isinstance(record, Conversation) else as_turns(record)
    lacks_ids = any(turn.role == "tool" and not turn.tool_call_id or any(not call.id for call in turn.tool_calls)
                    for turn in messages)
    messages = settle_calls(messages) if lacks_ids and shape.arguments == "text" else messages
    turns = [render_turn(turn, shape) for turn in messages]
    sides = (turns[:-1], turns[-1:]) if len(shape.columns) == 2 else (turns,)
    return dict(zip(shape.columns, sides)) | _tools(record, shape)


def _tools(record, shape) -> dict:
    tools = list(getattr(record, "tools", ()))
    return {"tools": json.dumps(tools, ensure_ascii=False) if shape.roles else tools} if tools else {}

def render_verdict(
    record: PreferencePair | Feedback,  # answers that were judged
    shape: Format,  # of prompts with judged answers
) -> dict:  # the row
    "Write a prompt with its better and worse answer, or with an answer and its verdict"
    fields = {name: getattr(record, name) for name in ("prompt", "chosen", "rejected", "completion")
              if hasattr(record, name)}
    if shape.holds == "text":
        said = {name: side if isinstance(side, str) else side[-1].content for name, side in fields.items()}
    else:
        roles = {"prompt": "user"}
        turns = {name: [Message(roles.get(name, "assistant"), side)] if isinstance(side, str) else side
                 for name, side in fields.items()}
        said = {name: [render_turn(turn, shape) for turn in side] for name, side in turns.items()}
    if "prompt" not in shape.columns.values():
        prompt = said.pop("prompt")
        said = {name: prompt + side for name, side in said.items()}
    if shape.roles:
        said = {name: side if name == "prompt" else side[0] for name, side in said.items()}
    said |= {"label": record.label} if isinstance(record, Feedback) else {}
    return {column: said[name] for column, name in shape.columns.items()} | _tools(record, shape)


def render_row(
    record,  # any record
    format: str,  # the name of a format, such as "sharegpt"
) -> dict:  # a row that reads back as the same record
    "Write a record as a row of a format, or say what the format cannot carry"
    shape = format_named(format)
    check_carried(record, format)
    if shape.record is Document:
        return {column: record.text for column in shape.columns}
    by_kind = {TrainingSample: render_sample, Conversation: render_conversation}
    return by_kind.get(shape.record, render_verdict)(record, shape)
