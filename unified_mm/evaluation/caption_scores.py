"""Caption scores of MS-COCO: CIDEr-D, BLEU-1 to 4 and ROUGE-L.

The three scorers take token lists, one candidate and any number of references for each image,
and agree with coco-caption (Chen et al. 2015) on the same tokens. `caption_scores` tokenizes
plain sentences and runs all three, over characters too where words are not set apart.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from unified_mm.data.records import UNSPACED

Tokens = Sequence[str]
Ngram = tuple[str, ...]

TOKENIZATION = "ptb-lite"
"""Name of the tokenization of `tokenize`; scores of different tokenizations do not compare."""

CHARACTERS = "characters/"
"""What the names of scores over characters begin with."""

MAX_NGRAM = 4
_CIDER_SIGMA = 6.0  # width in tokens of the length penalty; Vedantam et al. 2015, section 6
_ROUGE_BETA = 1.2  # weight of recall in coco-caption
# coco-caption's guards against 0 / 0. They are visible (an n-gram order without a single match
# gives about 1e-4, not 0), so scores agree only with the same values.
_BLEU_MATCH_GUARD, _BLEU_COUNT_GUARD = 1e-15, 1e-9


def caption_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Returns the corpus scores of one generated caption per image against its references.

    Args:
      candidates: generated captions, one for each image; an empty one scores 0.
      references: for each image at least one reference caption.

    Returns:
      `cider_d` in [0, 10]; `bleu_1` to `bleu_4` and `rouge_l` in [0, 1]. Where the references are
      mostly `without_spaces`, the same over characters, as `characters/cider_d` and so on.

    Raises:
      ValueError: there is no image, lengths differ, or an image has no reference.
    """
    scores = _scores_over(tokenize, candidates, references)
    if without_spaces(references):
        found = _scores_over(characters, candidates, references)
        scores |= {CHARACTERS + name: value for name, value in found.items()}
    return scores


def _scores_over(
    split: Callable[[str], list[str]],
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
) -> dict[str, float]:
    """Returns the three scores of sentences over the tokens that `split` makes of them."""
    written = [split(text) for text in candidates]
    wanted = [[split(text) for text in texts] for texts in references]
    return {
        "cider_d": cider_d(written, wanted),
        **{f"bleu_{n}": value for n, value in enumerate(bleu(written, wanted), start=1)},
        "rouge_l": rouge_l(written, wanted),
    }


def cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Returns the CIDEr-D of a corpus in [0, 10]: the mean of `cider_d_per_image`."""
    return float(np.mean(cider_d_per_image(candidates, references)))


def cider_d_per_image(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> Float[np.ndarray, " images"]:
    """Returns the CIDEr-D of each image, in [0, 10].

    Vedantam et al. 2015, equations 2 to 4 and section 6: cosine similarity of tf-idf vectors of
    1- to 4-grams, with the candidate's weights clipped to the reference's and a Gaussian penalty
    on the difference of lengths, averaged over n and over references. Document frequencies come
    from the given references, one document per image: the score of an image depends on its
    corpus, and a corpus of one image scores 0.

    Raises:
      ValueError: there is no image, lengths differ, or an image has no reference.
    """
    _check_corpus(candidates, references)
    candidate_counts = [_ngrams(tokens) for tokens in candidates]
    reference_counts = [[_ngrams(tokens) for tokens in texts] for texts in references]
    images_with = Counter(ngram for counts in reference_counts for ngram in set().union(*counts))
    idf = {ngram: math.log(len(candidates) / n) for ngram, n in images_with.items()}
    idf_unseen = math.log(len(candidates))

    def weigh(counts: Counter[Ngram]) -> tuple[dict[Ngram, float], list[float]]:
        weights = {ngram: tf * idf.get(ngram, idf_unseen) for ngram, tf in counts.items()}
        squares = [0.0] * MAX_NGRAM
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        return weights, [math.sqrt(square) for square in squares]

    scores = np.zeros(len(candidates))
    for i, texts in enumerate(references):
        candidate = weigh(candidate_counts[i])
        for tokens, counts in zip(texts, reference_counts[i], strict=True):
            difference = len(candidates[i]) - len(tokens)
            penalty = math.exp(-(difference**2) / (2 * _CIDER_SIGMA**2))
            scores[i] += penalty * _clipped_cosine(candidate, weigh(counts)) / len(texts)
    return 10 * scores


def _clipped_cosine(
    candidate: tuple[dict[Ngram, float], list[float]],
    reference: tuple[dict[Ngram, float], list[float]],
) -> float:
    """Returns the mean over n of min(g(c), g(s)) . g(s) / (|g(c)| |g(s)|).

    It is 0 for each n where a vector is 0.
    """
    (weights, norms), (reference_weights, reference_norms) = candidate, reference
    products = [0.0] * MAX_NGRAM
    # In the order of the text: a set's order, and so the sum's last bit, differs between processes.
    for ngram, candidate_weight in weights.items():
        weight = reference_weights.get(ngram, 0.0)
        products[len(ngram) - 1] += min(candidate_weight, weight) * weight
    cosines = (
        product / (norm * reference_norm) if norm and reference_norm else 0.0
        for product, norm, reference_norm in zip(products, norms, reference_norms, strict=True)
    )
    return sum(cosines) / MAX_NGRAM


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Returns corpus BLEU-1 to BLEU-4 in [0, 1] (Papineni et al. 2002, section 2.3).

    Clipped n-gram matches and lengths are summed over the corpus; the brevity penalty uses the
    reference closest in length, the shorter of two equally close.

    Raises:
      ValueError: there is no image, lengths differ, or an image has no reference.
    """
    _check_corpus(candidates, references)
    matches, totals = [0] * MAX_NGRAM, [0] * MAX_NGRAM
    candidate_length = reference_length = 0
    for candidate, texts in zip(candidates, references, strict=True):
        length = len(candidate)
        candidate_length += length
        reference_length += min((abs(len(text) - length), len(text)) for text in texts)[1]
        most: Counter[Ngram] = Counter()
        for text in texts:
            most |= _ngrams(text)
        for ngram, count in (_ngrams(candidate) & most).items():
            matches[len(ngram) - 1] += count
        for n in range(MAX_NGRAM):
            totals[n] += max(length - n, 0)

    ratio = (candidate_length + _BLEU_MATCH_GUARD) / (reference_length + _BLEU_COUNT_GUARD)
    brevity = math.exp(min(0.0, 1 - 1 / ratio))
    precisions = [
        (match + _BLEU_MATCH_GUARD) / (total + _BLEU_COUNT_GUARD)
        for match, total in zip(matches, totals, strict=True)
    ]
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, MAX_NGRAM + 1)]


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Returns the mean ROUGE-L in [0, 1] (Lin 2004, section 3.1), with beta = 1.2.

    Precision and recall are those of the longest common subsequence, each the best over the
    references; beta weights recall.

    Raises:
      ValueError: there is no image, lengths differ, or an image has no reference.
    """
    _check_corpus(candidates, references)
    pairs = zip(candidates, references, strict=True)
    return math.fsum(_rouge_l_of_image(*pair) for pair in pairs) / len(candidates)


def _rouge_l_of_image(candidate: Tokens, references: Sequence[Tokens]) -> float:
    # An empty sentence is one empty token, as in coco-caption: it matches only another one.
    candidate = candidate or [""]
    texts = [text or [""] for text in references]
    common = [_common_subsequence(candidate, text) for text in texts]
    precision = max(common) / len(candidate)
    recall = max(length / len(text) for length, text in zip(common, texts, strict=True))
    if not precision:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _common_subsequence(a: Tokens, b: Tokens) -> int:
    """Returns the length of the longest common subsequence.

    Each row of the dynamic program is held in the bits of one integer (Hyyro 2004).
    """
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    row = (1 << len(a)) - 1
    for token in b:
        matched = row & places.get(token, 0)
        row = (row + matched) | (row - matched)
    return len(a) - (row & ((1 << len(a)) - 1)).bit_count()


def _ngrams(tokens: Tokens) -> Counter[Ngram]:
    """Returns how often each 1- to 4-gram occurs."""
    return Counter(_each_ngram(tokens))


def _each_ngram(tokens: Tokens) -> Iterator[Ngram]:
    for n in range(MAX_NGRAM):
        yield from zip(*(tokens[start:] for start in range(n + 1)), strict=False)


def _check_corpus(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> None:
    if len(candidates) != len(references):
        raise ValueError(
            f"{len(candidates)} candidates but references of {len(references)} images: "
            "give one candidate per image, in the same order."
        )
    if not candidates:
        raise ValueError("no captions to score: the corpus is empty.")
    bare = [i for i, texts in enumerate(references) if not texts]
    if bare:
        raise ValueError(
            f"{len(bare)} images have no reference caption (first: index {bare[0]}): leave them "
            "out of the corpus."
        )


_STRAIGHT_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d`", "''\"\"'")
_DROPPED = frozenset(".?!,:;-'\"()[]{}\u2013\u2014\u2026")
_CLITIC = r"(?:n't|'(?:s|m|d|re|ve|ll))(?!\w)"
_TOKEN = re.compile(
    r"(?:[^\W\d_]\.){2,}(?:[^\W\d_]\b)?"  # u.s.  a.m.
    r"|\b(?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\."  # abbreviations that keep their full stop
    rf"|{_CLITIC}"  # is n't, man 's
    rf"|\w(?:(?!{_CLITIC})(?:\w|[-/'.](?=\w)|(?<=\d)[,:](?=\d)))*"  # t-shirt  and/or  1,000  10:30
    r"|\S"
)
_SPLIT = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
}


def tokenize(text: str) -> list[str]:
    """Returns the lower-cased Penn-Treebank tokens of a plain sentence, without punctuation.

    It does without Java what coco-caption's PTBTokenizer does for captions: "isn't" becomes is,
    n't; "man's" becomes man, 's; hyphens and slashes inside a word stay; punctuation is dropped,
    but "3.5" and "u.s." keep theirs. It differs on purpose in dropping brackets (coco-caption
    means to, and leaves "-lrb-"), and does not handle web addresses or mark-up.
    """
    tokens: list[str] = []
    for token in _TOKEN.findall(text.lower().translate(_STRAIGHT_QUOTES)):
        if token not in _DROPPED:
            tokens.extend(_SPLIT.get(token, (token,)))
    return tokens


def without_spaces(references: Sequence[Sequence[str]]) -> bool:
    """Returns whether most letters are of scripts that set no space between words.

    Each sentence of such a script is one word to `tokenize`, and right only as a whole.
    """
    letters = [each for texts in references for text in texts for each in characters(text)]
    return 2 * sum(bool(UNSPACED.match(each)) for each in letters) > len(letters)


def characters(text: str) -> list[str]:
    """Returns the lower-cased characters of a sentence, without spaces and punctuation.

    Forms that differ in width alone are one character.
    """
    plain = unicodedata.normalize("NFKC", text).lower()
    return [each for each in plain if unicodedata.category(each)[0] in "LMNS"]
