"""The method once more, slow and obvious: one picture, loops and dictionaries.

Written from the paper and its published program, not from the tensor code it judges.
"""

import math
from collections import defaultdict

import numpy as np


def saliency(query, keys, scale):
    """(heads, D), (1 + V, heads, D) -> V floats."""
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


def smallest(values, count):
    return largest([-value for value in values], count)


def positions(index, height, width):
    return [(np.float32(i // width) / np.float32(height),
             np.float32(i % width) / np.float32(width)) for i in index]  # fmt: skip


def labels(features, places, num_centres, density_scale=8.0, radius=0.6):
    """(n, C), n pairs -> n labels."""
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


def quotas(sizes, sums, n1, n2):
    """Tokens each cluster keeps whole, in total n2 - len(sizes)."""
    clusters = range(len(sizes))
    wanted = n2 - len(sizes)
    quota = {
        k: min(round((sizes[k] - 1) / (n1 - len(sizes)) * wanted), sizes[k] - 1) if wanted else 0
        for k in clusters
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


def stage_two(key_norm, cluster_of, num_centres, n2):
    """Rows as (source token, members); members is None for a token kept whole."""
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
