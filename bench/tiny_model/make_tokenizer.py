"""Train the byte-level BPE tokenizer of the embedded model on the training books only.

    python bench/tiny_model/make_tokenizer.py build/tiny_model/training.txt build/tiny_model/tokenizer

Writes a directory in Hugging Face's layout: tokenizer.json, tokenizer_config.json, chat_template.jinja. The
pre-tokenizer is Qwen3.5's (the regular expression that llama.cpp calls qwen35), so that every reader of the GGUF file
tokenizes alike.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY = 2048
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN35), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    text = arguments.corpus.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text.split("\n\n"))
    tokenizer.save(str(arguments.directory / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen3_5Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (arguments.directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (arguments.directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokens = len(tokenizer.encode(text).ids)
    print(f"{arguments.directory}: {tokenizer.get_vocab_size()} tokens of {len(text) / tokens:.2f} bytes in the corpus")


if __name__ == "__main__":
    main()
