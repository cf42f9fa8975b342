"""Convert chapters of the held-out books to Scots with the program `scottish` from the Debian package filters.

    apt-get install bible-kjv filters
    python bench/tiny_model/dialect.py deltanet_ref/demo

Writes adapt.jsonl, evaluate.jsonl and, with the evaluation passages in plain English, evaluate-english.jsonl. Each row
{"text": ...} is a passage of whole verses from one chapter. The split is by chapter, so no verse is in both sets.
`scottish` is a fixed list of substitutions: the same text always gives the same Scots.
"""

import argparse
import json
import subprocess
from pathlib import Path

from corpus import held_out_chapters

PASSAGE = 900  # bytes: the next verse starts a new passage if it would exceed this


def passages(chapter):
    """Group the chapter's verses, one per line, into passages of at most PASSAGE bytes (more for one long verse)."""
    passage = ""
    for verse in chapter.verses:
        if passage and len(passage) + 1 + len(verse) > PASSAGE:
            yield passage
            passage = ""
        passage += "\n" + verse if passage else verse
    yield passage


def to_scots(text):
    return subprocess.run(["/usr/games/scottish"], input=text, check=True, capture_output=True, encoding="utf-8").stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    chapters = held_out_chapters()
    evaluate = [passage for chapter in chapters[4::8] for passage in passages(chapter)]
    adapt = [passage for chapter in chapters[1::2] for passage in passages(chapter)]
    for name, rows in (
        ("adapt", map(to_scots, adapt)),
        ("evaluate", map(to_scots, evaluate)),
        ("evaluate-english", evaluate),
    ):
        lines = [json.dumps({"text": text}) + "\n" for text in rows]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{directory / name}.jsonl: {len(lines)} passages, {sum(map(len, lines)):,} bytes")


if __name__ == "__main__":
    main()
