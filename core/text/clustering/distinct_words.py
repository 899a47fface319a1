"""Human-readable description of groups of texts by their most distinctive words."""

from __future__ import annotations

from collections.abc import Sequence

from .words import is_mostly_unspaced


def distinct_words(
    texts: Sequence[str], groups: Sequence[int], count: int, most: int = 12
) -> tuple[tuple[str, ...], ...]:
    """Return up to `most` words for each of `count` groups, ranked by mean tf-idf above the mean of all texts."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    settings = (
        {"analyzer": "char_wb", "ngram_range": (2, 3)} if is_mostly_unspaced(texts) else {"stop_words": "english"}
    )
    vectors = TfidfVectorizer(max_features=20_000, sublinear_tf=True, **settings)
    try:
        weights = vectors.fit_transform(texts)
    except ValueError:  # empty vocabulary
        return ((),) * count
    names, mean_weights = vectors.get_feature_names_out(), np.asarray(weights.mean(axis=0)).ravel()
    words: list[tuple[str, ...]] = []
    for group in range(count):
        rows = np.flatnonzero(np.asarray(groups) == group)
        if not rows.size:
            words.append(())
            continue
        excess = np.asarray(weights[rows].mean(axis=0)).ravel() - mean_weights
        order = np.argsort(-excess, kind="stable")[:most]
        words.append(tuple(str(names[index]).strip() for index in order if excess[index] > 0))
    return tuple(words)
