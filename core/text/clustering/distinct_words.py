"""What groups of texts are about, for a human: the words that are more frequent in one than in all."""

from __future__ import annotations

from collections.abc import Sequence

from .words import words_fail


def distinct_words(
    texts: Sequence[str], groups: Sequence[int], count: int, most: int = 12
) -> tuple[tuple[str, ...], ...]:
    """Return up to `most` words for each of `count` groups: those whose mean tf-idf is furthest above the mean of all."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    settings = (
        {"analyzer": "char_wb", "ngram_range": (2, 3)} if words_fail(texts) else {"stop_words": "english"}
    )
    vectors = TfidfVectorizer(max_features=20_000, sublinear_tf=True, **settings)
    try:
        weights = vectors.fit_transform(texts)
    except ValueError:  # no text has a word
        return ((),) * count
    names, everywhere = vectors.get_feature_names_out(), np.asarray(weights.mean(axis=0)).ravel()
    found: list[tuple[str, ...]] = []
    for group in range(count):
        rows = np.flatnonzero(np.asarray(groups) == group)
        if not rows.size:
            found.append(())
            continue
        above = np.asarray(weights[rows].mean(axis=0)).ravel() - everywhere
        order = np.argsort(-above, kind="stable")[:most]
        found.append(tuple(str(names[place]).strip() for place in order if above[place] > 0))
    return tuple(found)
