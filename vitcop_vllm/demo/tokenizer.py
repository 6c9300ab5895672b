"""The demo model's tokenizer: byte-level BPE, trained on its small world's questions."""

from collections.abc import Iterable
from typing import Any

SPECIALS = ("<unk>", "<s>", "</s>", "<image>")
ROLES = ("USER:", "ASSISTANT:")
VOCABULARY = 512


def byte_tokenizer(corpus: Iterable[str] = (), size: int = 0) -> Any:
    """A ``PreTrainedTokenizerFast`` that takes any text.

    Args:
        corpus: Texts whose frequent words become tokens. Without it every byte is a token.
            Words that do not occur in it, such as words in capitals, are spelled letter by
            letter, and numbers digit by digit.
        size: Maximum size of the vocabulary.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *alphabet))}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIALS[0]))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    roles: list[AddedToken] = []
    if size > len(vocabulary):
        roles = [AddedToken(role, normalized=False) for role in ROLES]
        trainer = trainers.BpeTrainer(
            vocab_size=size - len(roles),
            special_tokens=list(SPECIALS),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        model.train_from_iterator(corpus, trainer)
    model.add_special_tokens([AddedToken(t, special=True) for t in SPECIALS])
    model.add_tokens(roles)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token=SPECIALS[0],
        bos_token=SPECIALS[1],
        eos_token=SPECIALS[2],
        pad_token=SPECIALS[0],
    )
