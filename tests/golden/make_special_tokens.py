"""Make `special_tokens.json` beside it: the special tokens that `transformers` reads of a tokenizer's files.

Needs `transformers == 5.23.0`, which neither the package nor its tests need:

    python tests/golden/make_special_tokens.py

Each case has the contents of `tokenizer_config.json` and `special_tokens_map.json`, the tokens that `tokenizer.json`
marks as special, and then what transformers makes of them: bos, eos, and the ids of `<s>a</s>`.
"""

import json
import tempfile
from pathlib import Path

import tokenizers

BOTH = ["<s>", "</s>"]
CASES = [
    ({}, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, BOTH),  # names in the map only
    ({"bos_token": "</s>"}, {"bos_token": "<s>", "eos_token": "</s>"}, BOTH),  # the map is the later word
    ({"bos_token": "</s>", "added_tokens_decoder": {}}, {"bos_token": "<s>"}, BOTH),  # unless the config is complete
    ({"bos_token": "<s>"}, {"bos_token": None, "eos_token": "</s>"}, BOTH),
    ({"bos_token": "<s>", "eos_token": "</s>"}, {}, []),  # named, and not marked in tokenizer.json
    ({}, {"bos_token": "<s>", "eos_token": "</s>"}, []),
]


def write_files(directory: Path, config: dict, names: dict, special: list[str]) -> None:
    """A tokenizer of bytes, with `<s>` and `</s>` in its vocabulary."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab = {token: i for i, token in enumerate([*sorted(byte_level.alphabet()), *BOTH])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "special_tokens_map.json").write_text(json.dumps(names))


def main() -> None:
    from transformers import PreTrainedTokenizerFast

    rows = []
    for config, names, special in CASES:
        with tempfile.TemporaryDirectory() as directory:
            write_files(Path(directory), config, names, special)
            theirs = PreTrainedTokenizerFast.from_pretrained(directory)
        ids = theirs("<s>a</s>").input_ids
        rows.append([config, names, special, theirs.bos_token, theirs.eos_token, ids])
    text = ",\n".join(json.dumps(row) for row in rows)
    Path(__file__).with_name("special_tokens.json").write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
