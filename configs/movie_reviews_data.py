"""Lays the public movie-review data out for movie-reviews.toml.

    python configs/movie_reviews_data.py review_polarity.tar.gz rt-polaritydata.tar.gz FOLDER

Both archives are at https://www.cs.cornell.edu/people/pabo/movie-review-data/ (CC BY 4.0): "polarity dataset v2.0" of
Pang and Lee 2004, full reviews with a sentence a line, and "sentence polarity dataset v1.0" of Pang and Lee 2005.
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

# The reviews are ASCII; the labelled sentences came from web pages, in the encoding of these.
_ENCODING = "windows-1252"


def main(reviews: Path, sentences: Path, folder: Path) -> None:
    """Writes corpus.jsonl and labelled.jsonl; raises SystemExit where an archive holds none of the lines."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = ({"text": text} for name, text in lines(reviews) if "/txt_sentoken/" in f"/{name}")
    write(folder / "corpus.jsonl", corpus, reviews)
    labels = {".pos": "positive", ".neg": "negative"}
    labelled = ({"text": text, "label": labels[Path(name).suffix]} for name, text in lines(sentences, *labels))
    write(folder / "labelled.jsonl", labelled, sentences)


def lines(archive: Path, *suffixes: str) -> Iterator[tuple[str, str]]:
    """Name of the file and line, white space folded, of the files in the archive that end in one of the suffixes."""
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            file = tar.extractfile(member) if member.name.endswith(suffixes or (".txt",)) else None
            for line in file or ():
                if text := " ".join(line.decode(_ENCODING, errors="replace").split()):
                    yield member.name, text


def write(path: Path, rows: Iterator[dict[str, str]], archive: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        number = sum(bool(file.write(json.dumps(row, ensure_ascii=False) + "\n")) for row in rows)
    if not number:
        raise SystemExit(f"{archive} holds no lines for {path.name}; is it the archive that the text above names?")
    print(f"{path}: {number} rows")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
