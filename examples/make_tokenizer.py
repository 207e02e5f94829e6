"""How `examples/tokenizer` was made: a byte-level BPE of 2,048 tokens over the training text of the example corpus.

python examples/make_tokenizer.py
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
VOCABULARY = 2048


def texts() -> Iterator[str]:
    """Every training text of the corpus: captions, pages, conversations, instructions."""
    corpus = HERE / "corpus"
    for path in sorted((corpus / "pairs").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                body = archive.extractfile(member)
                if member.name.endswith(".txt") and body:
                    yield body.read().decode()
    for path in sorted((corpus / "interleaved").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield " ".join(json.loads(line)["text_list"])
    for item in json.loads((corpus / "instruct/llava_instruct.json").read_text(encoding="utf-8")):
        yield from (turn["value"] for turn in item["conversations"])
    for path in sorted((corpus / "text").glob("*.jsonl")):
        if path.stem != "heldout":
            for line in path.read_text(encoding="utf-8").splitlines():
                yield from (value for value in json.loads(line).values() if isinstance(value, str))


def main() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    folder = HERE / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<image>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{tokenizer.get_vocab_size()} tokens in {folder}")


if __name__ == "__main__":
    main()
