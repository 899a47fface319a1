"""Texts as points, and points sorted into clusters: tf-idf, truncated SVD, unit length, nearest centre.

After Cluster-Branch-Train-Merge (arXiv:2303.14177, section 2.1 of its code). Since points have length 1, what a word adds to its
text's point does not depend on the rest of the text: a text is the sum of its words' vectors, brought to length 1. So a text that
grows needs only its new words. Shapes: N = texts, F = words known, d = width, K = clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...artefacts.files import read_json, write_json
from ...artefacts.safetensors_io import Checkpoint, write_tensors
from ...errors import UserError
from .balanced_kmeans import fit, squared_distances
from .words import NUMBER, Analyser, hash_of, words_fail, words_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TENSORS_FILE = "clusterer.safetensors"
SETTINGS_FILE = "clusterer.json"
BATCH = 512
"""Texts that are looked at together."""
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class ClustererOptions:
    """How texts become points and points clusters."""

    width: int = 100
    """Of the points."""
    words: int = 100_000
    """Words that are told apart, the most frequent first."""
    fewest_texts: int = 2
    """Texts that a word must be in to be told apart."""
    stop_words: str | None = "english"
    """Words that say nothing of a text: `english` (scikit-learn's list and all numbers), a file with one on each line,
    or none."""
    analyser: Analyser | None = None
    """Not set: words, or runs of letters where most text is in scripts that have no spaces."""
    characters: int = 20_000
    """How much of a text's beginning is looked at."""
    balanced: bool = True
    """Whether the fit makes clusters of equal size."""
    rounds: int = 20


@dataclass(frozen=True, kw_only=True)
class ClustererSettings(ClustererOptions):
    """Everything that decides what a fit finds."""

    clusters: int
    seed: int = 0


@dataclass(frozen=True)
class Clusterer:
    """Knows words and centres; see `fit_clusterer`."""

    settings: ClustererSettings
    vocabulary: NDArray[np.uint64]
    """(F,), sorted hashes of the words that are told apart."""
    vectors: NDArray[np.float32]
    """(F, d): what each word adds to its text's point."""
    centres: NDArray[np.float32]
    """(K, d)."""
    spellings: tuple[str, ...] = field(default=(), repr=False)
    """The words, in the order of `vocabulary`."""

    def sums(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the sum of the vectors of each text's words, (N, d): what a growing text adds up."""
        import numpy as np
        from scipy.sparse import csr_matrix

        assert self.settings.analyser is not None
        words = words_of([text[: self.settings.characters] for text in texts], self.settings.analyser)
        places, known = find(self.vocabulary, words.hashes)
        counts = csr_matrix(
            (np.ones(int(known.sum()), np.float32), (words.texts[known], places[known])),
            shape=(len(texts), len(self.vocabulary)),
        )
        found: NDArray[np.float32] = counts @ self.vectors
        return found

    def points(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the texts' points of length 1, (N, d); 0 for a text of which no word is known."""
        return unit_rows(self.sums(texts))

    def distances(self, points_Nd: NDArray[Any]) -> NDArray[np.float64]:
        """Return squared distances to the centres, (N, K)."""
        return squared_distances(points_Nd, self.centres)

    def assign(self, texts: Iterable[str]) -> Iterable[int]:
        """Yield the nearest cluster of each text, in order; texts are held a few at a time."""
        for batch in batches(texts, BATCH):
            yield from self.distances(self.points(batch)).argmin(axis=1).tolist()

    def top_words(self, cluster: int, count: int = 12) -> list[str]:
        """Return the words that lead towards a centre most, away from the mean of all."""
        direction = self.centres[cluster] - self.centres.mean(axis=0)
        order = (self.vectors @ direction).argsort()[::-1][:count]
        return [self.spellings[place] for place in order]

    def write(self, folder: Path) -> None:
        """Write `clusterer.safetensors` and `clusterer.json`."""
        import numpy as np
        import torch

        write_tensors(
            folder / TENSORS_FILE,
            {
                "vocabulary": torch.from_numpy(self.vocabulary.view(np.int64).copy()),
                "vectors": torch.from_numpy(self.vectors),
                "centres": torch.from_numpy(self.centres),
            },
        )
        write_json(folder / SETTINGS_FILE, {"settings": asdict(self.settings), "words": list(self.spellings)})

    @classmethod
    def read(cls, folder: Path) -> Clusterer:
        """Read what `write` wrote; raises `UserError` where it is not there."""
        import numpy as np

        stored, content = Checkpoint([folder / TENSORS_FILE]), read_json(folder / SETTINGS_FILE)
        arrays = {name: stored.read(name).numpy() for name in ("vocabulary", "vectors", "centres")}
        return cls(
            ClustererSettings(**content["settings"]),
            arrays["vocabulary"].view(np.uint64),
            arrays["vectors"],
            arrays["centres"],
            tuple(content["words"]),
        )


def fit_clusterer(
    texts: Sequence[str], settings: ClustererSettings, say: Callable[[str], None] = lambda line: None
) -> Clusterer:
    """Learn words, points and centres from texts, which should be a sample that fits into memory.

    Raises `UserError` for fewer texts with words than clusters.
    """
    from dataclasses import replace

    import numpy as np
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    shortened = [text[: settings.characters] for text in texts]
    if settings.analyser is None:
        chosen: Analyser = "characters" if words_fail(shortened) else "words"
        settings = replace(settings, analyser=chosen)
        say(f"texts are taken by their {'words' if chosen == 'words' else 'runs of two and three letters'}")
    counts, vocabulary, spellings = _counted(shortened, settings)
    used = np.flatnonzero(np.diff(counts.indptr))
    if len(used) < settings.clusters:
        raise UserError(
            f"{settings.clusters} clusters need at least as many texts with words that occur in others too, and of "
            f"{len(texts)} texts {len(used)} have such words; ask for fewer clusters, or add text"
        )
    idf = TfidfTransformer().fit(counts)
    weighted = idf.transform(counts[used])
    width = min(settings.width, len(vocabulary) - 1, len(used) - 1)
    if width < 1:
        vectors = np.ones((len(vocabulary), 1), np.float32) * idf.idf_[:, None].astype(np.float32)
    else:
        # texts that are all the same have variance 0, of which scikit-learn takes shares that nobody reads
        with np.errstate(invalid="ignore", divide="ignore"):
            svd = TruncatedSVD(n_components=width, random_state=settings.seed).fit(weighted)
        vectors = (idf.idf_[:, None] * np.transpose(svd.components_)).astype(np.float32)
    points = unit_rows(counts[used].astype(np.float32) @ vectors)
    found = fit(
        points, settings.clusters, seed=settings.seed, rounds=settings.rounds, balanced=settings.balanced
    )
    say(f"{len(vocabulary):,} words; centres at rest after {found.rounds} rounds (moved {found.shift:.1g})")
    return Clusterer(settings, vocabulary, vectors, found.centres.astype(np.float32), spellings)


def _counted(
    texts: Sequence[str], settings: ClustererSettings
) -> tuple[Any, NDArray[np.uint64], tuple[str, ...]]:
    """Return counts (N, F), the words that are told apart, and their spellings."""
    import numpy as np
    from scipy.sparse import csr_matrix

    assert settings.analyser is not None
    stopped = _stop_words(settings)
    rows, hashes, spelled = [], [], {}
    for begin in range(0, len(texts), BATCH):
        words = words_of(texts[begin : begin + BATCH], settings.analyser)
        kept = ~np.isin(words.hashes, stopped)
        rows.append(words.texts[kept] + begin)
        hashes.append(words.hashes[kept])
        firsts, places = np.unique(words.hashes, return_index=True)
        for one, place in zip(firsts.tolist(), places.tolist(), strict=True):
            if one not in spelled:
                spelled[one] = words.spelling(place)
    row, column = (
        np.concatenate([[], *rows]).astype(np.int64),
        np.concatenate([np.zeros(0, np.uint64), *hashes]),
    )
    everything, places = np.unique(column, return_inverse=True)
    counts = csr_matrix((np.ones(len(row)), (row, places)), shape=(len(texts), len(everything)))
    counts.sum_duplicates()
    spread = np.bincount(counts.indices, minlength=len(everything))
    fewest = min(settings.fewest_texts, len(texts))
    ranked = np.argsort(-spread, kind="stable")[: settings.words]
    kept_words = np.sort(ranked[spread[ranked] >= fewest])
    return (
        counts[:, kept_words].tocsr(),
        everything[kept_words],
        tuple(spelled[one] for one in everything[kept_words].tolist()),
    )


def _stop_words(settings: ClustererSettings) -> NDArray[np.uint64]:
    import numpy as np

    if settings.stop_words is None:
        return np.zeros(0, np.uint64)
    if settings.stop_words == "english":
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

        words = [NUMBER, *sorted(ENGLISH_STOP_WORDS)]
    else:
        path = Path(settings.stop_words).expanduser()
        if not path.is_file():
            raise UserError(
                f"there are no stop words for '{settings.stop_words}'; take english, none, or a file with a word on each line"
            )
        words = path.read_text(encoding="utf-8").lower().split()
    return np.array([hash_of(word) for word in words], np.uint64)


def find(
    sorted_F: NDArray[np.uint64], wanted: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where in a sorted array the wanted values stand, and which of them do."""
    import numpy as np

    if not len(sorted_F):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    places = np.minimum(np.searchsorted(sorted_F, wanted), len(sorted_F) - 1)
    return places, sorted_F[places] == wanted


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return rows of length 1; one of 0 stays so."""
    import numpy as np

    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: NDArray[np.float32] = (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return found


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last maybe shorter."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
