"""Clustering of texts: tf-idf, truncated SVD, normalisation, nearest centre.

After Cluster-Branch-Train-Merge (arXiv:2303.14177, section 2.1 and its code). A text's embedding is the normalised sum
of its words' vectors. Normalisation makes a word's vector independent of the rest of the text, so a growing text needs
only its new words. Shapes: N = texts, F = vocabulary, d = width, K = clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ...artefacts.files import read_json, write_json
from ...artefacts.safetensors_io import Checkpoint, write_tensors
from ...errors import UserError
from ...reporting import SILENT, Reporter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TENSORS_FILE = "clusterer.safetensors"
SETTINGS_FILE = "clusterer.json"
Analyser = Literal["words", "characters"]
"""`words`, or `characters`: bigrams and trigrams of letters, for languages without spaces between words."""
BATCH = 512
"""Texts per batch."""
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class ClustererOptions:
    """Options of embedding and clustering."""

    width: int = 100
    """Dimension of the embeddings."""
    words: int = 100_000
    """Maximum vocabulary size, most frequent words first."""
    fewest_texts: int = 2
    """Minimum number of texts that contain a word of the vocabulary."""
    stop_words: str | None = "english"
    """Ignored words: `english` (scikit-learn's list and all numbers), a file with one word per line, or None."""
    analyser: Analyser | None = None
    """`words` or `characters` (letter n-grams). None: chosen by whether most of the text is in scripts with spaces."""
    characters: int = 20_000
    """Number of characters used from the start of each text."""
    balanced: bool = True
    """Whether clusters have equal sizes."""
    rounds: int = 20
    """Maximum number of k-means rounds."""


@dataclass(frozen=True, kw_only=True)
class ClustererSettings(ClustererOptions):
    """All settings that determine the result of a fit."""

    clusters: int
    seed: int = 0


@dataclass(frozen=True)
class Clusterer:
    """A fitted clusterer: vocabulary, word vectors and centres; see `fit_clusterer`."""

    settings: ClustererSettings
    vocabulary: NDArray[np.uint64]
    """Sorted hashes of the words, (F,)."""
    vectors: NDArray[np.float32]
    """Vector of each word, (F, d)."""
    centres: NDArray[np.float32]
    """(K, d)."""
    spellings: tuple[str, ...] = field(default=(), repr=False)
    """The words in the order of `vocabulary`."""

    def sums(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the sum of the vectors of each text's words, (N, d); sums of consecutive texts add up."""
        import numpy as np
        from scipy.sparse import csr_matrix

        from .words import words_of

        assert self.settings.analyser is not None
        words = words_of([text[: self.settings.characters] for text in texts], self.settings.analyser)
        places = np.searchsorted(self.vocabulary, words.hashes)
        known = self.vocabulary.take(places, mode="clip") == words.hashes
        ones = np.ones(int(known.sum()), np.float32)
        shape = (len(texts), len(self.vocabulary))
        counts = csr_matrix((ones, (words.texts[known], places[known])), shape=shape)
        return np.asarray(counts @ self.vectors)

    def points(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the normalised embeddings of texts, (N, d); zero for a text without a known word."""
        return unit_rows(self.sums(texts))

    def distances(self, points_Nd: NDArray[Any]) -> NDArray[np.float64]:
        """Return squared distances to the centres, (N, K)."""
        from .balanced_kmeans import squared_distances

        return squared_distances(points_Nd, self.centres)

    def assign(self, texts: Iterable[str]) -> Iterator[int]:
        """Yield the nearest cluster of each text, in order, one batch in memory at a time."""
        for batch in batches(texts, BATCH):
            yield from self.distances(self.points(batch)).argmin(axis=1).tolist()

    def top_words(self, cluster: int, count: int = 12) -> list[str]:
        """Return the `count` words most aligned with a centre relative to the mean of all centres."""
        direction = self.centres[cluster] - self.centres.mean(axis=0)
        order = (self.vectors @ direction).argsort()[::-1][:count]
        return [self.spellings[index] for index in order]

    def write(self, folder: Path) -> None:
        """Write `clusterer.safetensors` and `clusterer.json`."""
        import numpy as np
        import torch

        arrays = {"vocabulary": self.vocabulary.view(np.int64).copy(), "vectors": self.vectors, "centres": self.centres}
        write_tensors(folder / TENSORS_FILE, {name: torch.from_numpy(array) for name, array in arrays.items()})
        write_json(folder / SETTINGS_FILE, {"settings": asdict(self.settings), "words": list(self.spellings)})

    @classmethod
    def read(cls, folder: Path) -> Clusterer:
        """Read a clusterer written by `write`; raises `UserError` if a file is missing."""
        import numpy as np

        stored, content = Checkpoint([folder / TENSORS_FILE]), read_json(folder / SETTINGS_FILE)
        vocabulary, vectors, centres = (stored.read(name).numpy() for name in ("vocabulary", "vectors", "centres"))
        settings, words = ClustererSettings(**content["settings"]), tuple(content["words"])
        return cls(settings, vocabulary.view(np.uint64), vectors, centres, words)


def fit_clusterer(texts: Sequence[str], settings: ClustererSettings, reporter: Reporter = SILENT) -> Clusterer:
    """Fit vocabulary, word vectors and centres to a sample of texts, which must fit into memory.

    Raises `UserError` if fewer texts have words of the vocabulary than there are clusters.
    """
    import numpy as np
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    from .balanced_kmeans import fit
    from .words import is_mostly_unspaced

    shortened = [text[: settings.characters] for text in texts]
    if settings.analyser is None:
        analyser: Analyser = "characters" if is_mostly_unspaced(shortened) else "words"
        settings = replace(settings, analyser=analyser)
        reporter.say(f"clustering by {'words' if analyser == 'words' else 'letter bigrams and trigrams'}")
    counts, vocabulary, spellings = _count_words(shortened, settings)
    used = np.flatnonzero(np.diff(counts.indptr))
    if len(used) < settings.clusters:
        raise UserError(
            f"{settings.clusters} clusters need at least {settings.clusters} texts that share words with other texts; "
            f"only {len(used)} of {len(texts)} texts do; use fewer clusters or add text"
        )
    idf = TfidfTransformer().fit(counts)
    weighted = idf.transform(counts[used])
    width = min(settings.width, len(vocabulary) - 1, len(used) - 1)
    if width < 1:
        vectors = np.ones((len(vocabulary), 1), np.float32) * idf.idf_[:, None].astype(np.float32)
    else:
        # identical texts have variance 0, and scikit-learn divides by it for an attribute that is not used here
        with np.errstate(invalid="ignore", divide="ignore"):
            svd = TruncatedSVD(n_components=width, random_state=settings.seed).fit(weighted)
        vectors = (idf.idf_[:, None] * np.transpose(svd.components_)).astype(np.float32)
    points = unit_rows(counts[used].astype(np.float32) @ vectors)
    kmeans = fit(points, settings.clusters, seed=settings.seed, rounds=settings.rounds, balanced=settings.balanced)
    reporter.say(
        f"{len(vocabulary):,} words; k-means ended after {kmeans.rounds} rounds (last shift {kmeans.shift:.1g})"
    )
    return Clusterer(settings, vocabulary, vectors, kmeans.centres.astype(np.float32), spellings)


def _count_words(texts: Sequence[str], settings: ClustererSettings) -> tuple[Any, NDArray[np.uint64], tuple[str, ...]]:
    """Return word counts (N, F), the sorted hashes of the vocabulary (F,) and its spellings."""
    import numpy as np
    from scipy.sparse import csr_matrix

    from .words import words_of

    assert settings.analyser is not None
    stop_words = _stop_words(settings)
    rows, hashes, spelling_of = [], [], {}
    for begin in range(0, len(texts), BATCH):
        words = words_of(texts[begin : begin + BATCH], settings.analyser)
        kept = ~np.isin(words.hashes, stop_words)
        rows.append(words.texts[kept] + begin)
        hashes.append(words.hashes[kept])
        distinct, first_numbers = np.unique(words.hashes, return_index=True)
        for word_hash, number in zip(distinct.tolist(), first_numbers.tolist(), strict=True):
            if word_hash not in spelling_of:
                spelling_of[word_hash] = words.spelling(number)
    row = np.concatenate([[], *rows]).astype(np.int64)
    all_hashes, columns = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]), return_inverse=True)
    counts = csr_matrix((np.ones(len(row)), (row, columns)), shape=(len(texts), len(all_hashes)))
    counts.sum_duplicates()
    num_texts = np.bincount(counts.indices, minlength=len(all_hashes))
    fewest = min(settings.fewest_texts, len(texts))
    ranked = np.argsort(-num_texts, kind="stable")[: settings.words]
    kept_words = np.sort(ranked[num_texts[ranked] >= fewest])
    return (
        counts[:, kept_words].tocsr(),
        all_hashes[kept_words],
        tuple(spelling_of[word_hash] for word_hash in all_hashes[kept_words].tolist()),
    )


def _stop_words(settings: ClustererSettings) -> NDArray[np.uint64]:
    import numpy as np

    from .words import NUMBER, hash_of

    if settings.stop_words is None:
        return np.zeros(0, np.uint64)
    if settings.stop_words == "english":
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

        words = [NUMBER, *sorted(ENGLISH_STOP_WORDS)]
    else:
        path = Path(settings.stop_words).expanduser()
        if not path.is_file():
            raise UserError(
                f"stop word file '{settings.stop_words}' does not exist; use english, none, or a file with one word "
                "per line"
            )
        words = path.read_text(encoding="utf-8").lower().split()
    return np.array([hash_of(word) for word in words], np.uint64)


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return the rows normalised to length 1; zero rows stay zero."""
    import numpy as np

    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray((rows / np.where(lengths > 0, lengths, 1)).astype(np.float32))


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
