"""Training sequences have the form of the prompts that a server gets."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.batch import IGNORED, SUBJECT_HEAD, BatchShape
from demo.dataset import Encoder, make_batch
from demo.llava_form import LlavaForm
from demo.questions import FAMILIES, Turn, corpus
from demo.world import ALPHABET, COLOUR_NAMES, RADII, SHAPES
from vitcop_vllm.demo.checkpoint import DEMO, save_config
from vitcop_vllm.demo.tokenizer import VOCABULARY, byte_tokenizer

TURNS = (
    Turn("Is there a red star?", "no"),
    Turn("What does the sign say?", "EXIT 42"),
    Turn("Where is it?", "top left"),
)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Any:
    from transformers import AutoProcessor

    path: Path = tmp_path_factory.mktemp("demo")
    save_config(path, DEMO, byte_tokenizer(corpus(300), VOCABULARY))
    return AutoProcessor.from_pretrained(path)


def templated(processor: Any, images: int, turns: tuple[Turn, ...]) -> list[int]:
    """Token ids of a conversation up to its last answer, from the chat template."""
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        marks = [{"type": "image"}] * (0 if i else images)
        messages.append(
            {"role": "user", "content": [*marks, {"type": "text", "text": turn.question}]}
        )
        messages.append({"role": "assistant", "content": turn.answer})
    text = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    ids: list[int] = processor.tokenizer(text, add_special_tokens=False).input_ids
    return ids


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("turns", [TURNS[:1], TURNS[1:2], TURNS[:2], TURNS])
def test_sequences_equal_the_chat_template(processor, images, turns):
    encoder = Encoder(processor.tokenizer, LlavaForm())
    ids, labels = encoder.conversation(turns)
    answer = encoder.ids(f" {turns[-1].answer}</s>")
    assert ids[-len(answer) :] == labels[-len(answer) :] == answer
    prompt = encoder.prefix([1] * images) + ids[: -len(answer)]
    assert prompt == templated(processor, images, turns)
    # The decoded answer is the text itself.
    assert processor.tokenizer.decode(answer, skip_special_tokens=True).strip() == turns[-1].answer


@pytest.mark.parametrize("pair_share", [0.0, 1.0])
def test_a_batch_holds_whole_conversations_about_the_patches_it_keeps(processor, pair_share):
    encoder = Encoder(processor.tokenizer, LlavaForm())
    shape = BatchShape(112, 4, 120, (0.25,), pair_share)
    batch = make_batch(shape, encoder, (0, 1, 2))
    sequences = batch.sequences
    assert sequences is not None
    per_sequence = 2 if pair_share else 1
    assert batch.pixels.shape == (4, 112, 112, 3)
    assert all(target.shape == (4, 64, 1) for target in batch.targets.values())
    assert sequences.kept.shape == (4, 48)
    assert bool((sequences.kept.diff(dim=1) > 0).all())
    assert len(sequences.ids) == 4 // per_sequence
    assert bool(((sequences.ids == encoder.image).sum(dim=1) == 48 * per_sequence).all())
    end = processor.tokenizer.eos_token_id
    families_found = set()
    for ids, labels, positions, segments, families in zip(
        sequences.ids,
        sequences.labels,
        sequences.positions[0],
        sequences.segments,
        sequences.families,
        strict=True,
    ):
        begin = int((segments == 0).sum())
        assert positions[:begin].tolist() == list(range(begin))
        assert bool((labels[:begin] == IGNORED).all())
        for number in range(1, int(segments.max()) + 1):
            inside = segments == number
            # Positions of every conversation directly follow the images.
            assert positions[inside].tolist() == list(range(begin, begin + int(inside.sum())))
            assert ids[inside][-1] == labels[inside][-1] == end
            (family,) = families[inside & (labels != IGNORED)].unique().tolist()
            families_found.add(FAMILIES[family])
    assert ("two pictures" in families_found) == bool(pair_share)
    again = make_batch(shape, encoder, (0, 1, 2))
    assert torch.equal(batch.pixels, again.pixels)
    assert torch.equal(sequences.ids, again.sequences.ids)  # type: ignore[union-attr]


def test_background_first_drops_background_before_other_patches(processor):
    batch = make_batch(
        BatchShape(168, 8, 120, (0.7,), 0.0, True), Encoder(processor.tokenizer, LlavaForm()), (1,)
    )
    assert batch.sequences is not None
    shown = ((batch.targets["shape"] > 0) | (batch.targets["letter"] > 0)).any(dim=-1)
    kept = torch.zeros_like(shown).scatter_(1, batch.sequences.kept, True)
    keeps_all_shown = (kept & shown == shown).all(dim=1)
    keeps_only_shown = (kept & shown == kept).all(dim=1)
    assert bool((keeps_all_shown | keeps_only_shown).all())
    assert bool(keeps_all_shown.any())


Look = tuple[str, str, str, dict[str, set[str]]]
"""Family of questions, text of the token ("" at a prompt's end), rest of the answer after the
token, and names that the patches to look at show."""

NAMES = {"colour": COLOUR_NAMES, "shape": SHAPES, "size": tuple(RADII), "letter": tuple(ALPHABET)}


def looks_of(tokenizer: Any, in_answers: bool) -> Iterator[Look]:
    """Looks of answers' tokens (head :data:`SUBJECT_HEAD`) or of prompts' last tokens."""
    encoder = Encoder(tokenizer, LlavaForm())
    for seed in range(4):
        batch = make_batch(BatchShape(168, 6, 300, (0.25,)), encoder, (0, 3, seed))
        sequences = batch.sequences
        assert sequences is not None
        assert sequences.looks.shape == (len(sequences.looked), 3)
        assert bool(sequences.looked.any(dim=1).all())
        for (row, token, head), looked in zip(
            sequences.looks.tolist(), sequences.looked, strict=True
        ):
            if (head == SUBJECT_HEAD) != in_answers:
                continue
            assert sequences.labels[row, token + 1] == sequences.ids[row, token + 1]
            answer = tokenizer.decode(sequences.ids[row, token + 1 :]).split("</s>")[0]
            patches = sequences.kept[row][looked]
            shown = {
                kind: {
                    names[i - 1] for i in batch.targets[kind][row][patches].flatten().tolist() if i
                }
                for kind, names in NAMES.items()
            }
            prompt = sequences.labels[row, token] == IGNORED
            before = "" if prompt else tokenizer.decode(sequences.ids[row, token])
            yield FAMILIES[int(sequences.families[row, token + 1])], before, answer, shown


def test_a_prompt_s_last_token_looks_at_the_patches_with_the_answer(processor):
    found: Counter[str] = Counter()
    for family, before, answer, shown in looks_of(processor.tokenizer, in_answers=False):
        assert before == ""
        if family in {"colour", "shape", "size"}:
            assert shown[family] == {answer.strip()}
            found[family] += 1
    assert len(found) == 3


def test_a_token_looks_at_the_patches_that_the_next_word_describes(processor):
    found: Counter[str] = Counter()
    for family, before, answer, shown in looks_of(processor.tokenizer, in_answers=True):
        found[family] += 1
        word = answer.split(",")[0].strip()
        if family == "text" or answer[0].isupper():
            assert shown["letter"] == {word[0]}
        elif family == "odd one out":
            assert shown["shape"] == {answer.split()[-1]}
        elif family == "description" and not before and "sign" not in word and answer[0] == " ":
            size, colour, shape = word.split()
            assert (shown["size"], shown["colour"], shown["shape"]) == ({size}, {colour}, {shape})
    assert set(found) >= {"text", "description", "position", "odd one out"}
