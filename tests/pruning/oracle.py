"""A slow, obvious implementation of the method and of the other selectors, for one image.

Written from the papers and their published programs, independently of the tensor code.
"""

import math
from collections import defaultdict

import numpy as np


def saliency(query, keys, scale):
    """(heads, D), (1 + V, heads, D) -> V floats: attention of [CLS], summed over heads."""
    heads, _ = query.shape
    total = np.zeros(len(keys) - 1)
    for head in range(heads):
        scores = [scale * float(np.dot(query[head], key[head])) for key in keys]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        for patch in range(1, len(keys)):
            total[patch - 1] += weights[patch] / sum(weights)
    return total


def largest(values, count):
    """Indices of the ``count`` largest values, ascending; ties by lower index."""
    ranking = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return sorted(ranking[:count])


def shows_change(before, now, same=0.01):
    """Pixels (tokens, numbers) of two frames -> whether each token shows a change.

    Its mean square difference is above a share ``same`` of the variance of the frame's pixels.
    """
    before, now = (np.asarray(pixels, dtype=np.float64) for pixels in (before, now))
    variance = ((now - now.mean()) ** 2).mean()
    return [bool(((a - b) ** 2).mean() > same * variance) for a, b in zip(before, now, strict=True)]


def largest_of_changed(values, changed, count):
    """As :func:`largest`, but values of unchanged tokens come after all others."""
    ranking = sorted(range(len(values)), key=lambda i: (not changed[i], -values[i], i))
    return sorted(ranking[:count])


def smallest(values, count):
    return largest([-value for value in values], count)


def positions(index, height, width):
    return [(np.float32(i // width) / np.float32(height),
             np.float32(i % width) / np.float32(width)) for i in index]  # fmt: skip


def labels(features, places, num_centres, density_scale=8.0, radius=0.6):
    """(n, C) features, n (row, column) pairs -> n cluster labels."""
    n = len(features)
    rows = np.asarray(features, dtype=np.float64)
    distance = [[np.float32(math.sqrt(((rows[i] - rows[j]) ** 2).sum())) for j in range(n)]
                for i in range(n)]  # fmt: skip
    density = [
        np.float32(math.fsum(math.exp(-((float(d) / density_scale) ** 2)) for d in row))
        for row in distance
    ]

    def is_denser(j, i):
        return density[j] > density[i] or (density[j] == density[i] and j < i)

    def is_near(i, j):
        down, right = places[i][0] - places[j][0], places[i][1] - places[j][1]
        return np.sqrt(down * down + right * right) <= np.float32(radius)

    parent, delta = {}, {}
    for i in range(n):
        delta[i] = np.float32(np.inf)
        for j in range(n):
            if j != i and is_denser(j, i) and is_near(i, j) and distance[i][j] < delta[i]:
                parent[i], delta[i] = j, distance[i][j]

    ranking = sorted(range(n), key=lambda i: (-(density[i] * delta[i]), i))
    centres = ranking[:num_centres]

    def follow(i):
        while i not in centres:
            if i in parent:
                i = parent[i]
            else:
                i = min(centres, key=lambda c: (distance[i][c], centres.index(c)))
        return centres.index(i)

    return [follow(i) for i in range(n)]


def share(size, n1, num_clusters, n2):
    """Unmerged tokens of a cluster before the total is corrected; each step rounds to float32."""
    quotient = np.float32(size - 1) / np.float32(n1 - num_clusters)
    return round(float(quotient * np.float32(n2 - num_clusters)))  # halves to even


def quotas(sizes, sums, n1, n2):
    """Unmerged tokens of each cluster; they sum to n2 - len(sizes)."""
    clusters = range(len(sizes))
    wanted = n2 - len(sizes)
    quota = {
        k: min(share(sizes[k], n1, len(sizes), n2), sizes[k] - 1) if wanted else 0 for k in clusters
    }
    while sum(quota.values()) < wanted:
        for k in sorted(clusters, key=lambda k: (sums[k], k)):
            if sum(quota.values()) < wanted and quota[k] < sizes[k] - 1:
                quota[k] += 1
    while sum(quota.values()) > wanted:
        for k in sorted(clusters, key=lambda k: (-sums[k], k)):
            if sum(quota.values()) > wanted and quota[k] > 0:
                quota[k] -= 1
    return [quota[k] for k in clusters]


def key_norms(keys):
    """(n, heads, D) -> (n,): norm of each token's mean key; smaller is more salient."""
    return np.linalg.norm(keys.mean(axis=1), axis=-1)


def value_scores(values):
    """(n, heads, D) -> (n,): what the mean norm of a token's values lacks to the largest."""
    norms = np.array([sum(np.linalg.norm(v) for v in token) / len(token) for token in values])
    return norms.max() - norms


def image_attention_scores(query, keys, scale, last=16):
    """(n, heads, D), (n, kv_heads, D) -> (n,): what a token's attention lacks to the largest.

    Its attention is the mean over heads, and over those of the ``last`` tokens that see it.
    """
    n, heads, _ = query.shape
    share = heads // keys.shape[1]
    received = np.zeros((n, 2))  # sum and number
    for i in range(max(0, n - last), n):
        for head in range(heads):
            scores = scale * keys[: i + 1, head // share].astype(np.float64) @ query[i, head]
            weights = np.exp(scores - scores.max())
            received[: i + 1, 0] += weights / weights.sum()
            received[: i + 1, 1] += 1
    mean = received[:, 0] / received[:, 1]
    return mean.max() - mean


def stage_two(key_norm, cluster_of, num_centres, n2):
    """Rows as (source token, members); members is None for an unmerged token."""
    n1 = len(key_norm)
    clusters = defaultdict(list)
    for token in range(n1):
        clusters[cluster_of[token]].append(token)
    sums = [math.fsum(float(key_norm[i]) for i in clusters[k]) for k in range(num_centres)]
    kept: list[int] = []
    groups: list[list[int]] = []
    if num_centres > n2:
        ranking = sorted(range(num_centres), key=lambda k: (sums[k], k))
        groups = [clusters[k] for k in ranking[: n2 - 1]]
        groups.append([token for k in ranking[n2 - 1 :] for token in clusters[k]])
    else:
        sizes = [len(clusters[k]) for k in range(num_centres)]
        for k, quota in enumerate(quotas(sizes, sums, n1, n2)):
            whole = sorted(clusters[k], key=lambda i: (key_norm[i], i))[:quota]
            kept += whole
            groups.append([token for token in clusters[k] if token not in whole])
    output: list[tuple[int, list[int] | None]] = [(token, None) for token in kept]
    for group in groups:
        members = sorted(group)
        output.append((members[len(members) // 2], members))
    return sorted(output, key=lambda row: row[0])


def merged(hidden, output):
    """(n1, H) and :func:`stage_two`'s rows -> (n2, H)."""
    result = []
    for source, members in output:
        row = hidden[source].copy()
        if members is not None:
            row = row + sum(hidden[i] for i in members) / len(members)
        result.append(row)
    return np.stack(result)


# Other selectors: each returns ``count`` token indices of one image, ascending.


def scatter(x):
    """MurmurHash3's last step, on a Python integer below 2^32."""
    for shift, factor in (16, 0x85EBCA6B), (13, 0xC2B2AE35):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x ^ (x >> 16)


def random_subset(pixels, patches, count):
    """A random subset of patches, seeded by every bit of the image's float32 pixels."""
    seed = 0
    for place, bits in enumerate(np.asarray(pixels, dtype=np.float32).reshape(-1).view(np.uint32)):
        seed = (seed + scatter(int(bits) ^ scatter(place))) % 2**32
    return smallest([scatter(seed ^ scatter(patch)) for patch in range(patches)], count)


def thresholds(height, width):
    """Thresholds of a Bayer matrix (ordered dithering), patch by patch."""
    matrix = [[0]]
    while len(matrix) < max(height, width):
        matrix = [
            [4 * value + add for add in adds for value in row]
            for adds in ((0, 2), (3, 1))
            for row in matrix
        ]
    return [matrix[row][column] for row in range(height) for column in range(width)]


def even_grid(height, width, count):
    """Patches with the smallest thresholds."""
    return smallest(thresholds(height, width), count)


def variance_between(high, low):
    """What Otsu's method makes largest, for two groups of values."""
    if not len(high) or not len(low):
        return 0.0
    return len(high) * len(low) * (np.mean(high) - np.mean(low)) ** 2


def contrasting(embeddings, saliency, height, width, count):
    """(V, H) embeddings, V floats -> tokens that stand out, and an even grid of the others."""
    unit = [row / np.linalg.norm(row) for row in np.asarray(embeddings, dtype=np.float64)]
    mean = np.mean(unit, axis=0)
    contrast = np.array([1 - float(row @ mean) for row in unit])
    saliency = np.asarray(saliency, dtype=np.float64)
    parts = [x / x.std() if x.std() else x for x in (contrast, saliency)]
    score = parts[0] + parts[1]
    falling = sorted(range(len(unit)), key=lambda i: (-score[i], i))
    values = [score[i] for i in falling]
    numbers = range(1, len(values) + 1)
    split = max(numbers, key=lambda n: variance_between(values[:n], values[n:]))
    high = falling[:split]
    even = thresholds(height, width)
    others = sorted((i for i in falling if i not in high), key=lambda i: (even[i], i))
    return sorted((high + others)[:count])


def cosine(a, b):
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(a @ b / math.sqrt(float(a @ a)) / math.sqrt(float(b @ b)))


def max_min_diversity(embeddings, count):
    """(V, H) embeddings -> greedy max-min selection by cosine distance."""
    tokens = range(len(embeddings))
    distance = [[1 - cosine(embeddings[i], embeddings[j]) for j in tokens] for i in tokens]
    chosen: list[int] = []
    while len(chosen) < count:
        others = {
            i: min((distance[i][j] for j in (chosen or tokens) if j != i), default=0.0)
            for i in tokens
            if i not in chosen
        }
        chosen.append(min(others, key=lambda i: (-others[i], i)))
    return sorted(chosen)


def last_token_attention(query, keys, scale, visual, count):
    """Query (heads, D) of the prompt's last token, keys (tokens, kv_heads, D) up to it."""
    received = [0.0] * len(keys)
    for head in range(len(query)):
        of_head = head * keys.shape[1] // len(query)
        scores = [scale * float(np.dot(query[head], key[of_head])) for key in keys]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        total = sum(weights)
        for token, weight in enumerate(weights):
            received[token] += weight / total / len(query)
    return largest([received[token] for token in visual], count)


def least_duplicated(keys, states, count, num_pivots=8):
    """Keys (n, kv_heads, D) and normed hidden states (n, H) of an image."""
    sizes = [float(np.abs(key.astype(np.float64)).sum()) for key in keys]
    pivots = sorted(range(len(keys)), key=lambda i: (-sizes[i], i))[: min(num_pivots, count)]
    kept = list(pivots)
    for number, pivot in enumerate(pivots):
        quota = (count - len(pivots)) // len(pivots)
        quota += number < (count - len(pivots)) % len(pivots)
        left = [i for i in range(len(keys)) if i not in kept]
        kept += sorted(left, key=lambda i: (cosine(states[pivot], states[i]), i))[:quota]
    return sorted(kept)
