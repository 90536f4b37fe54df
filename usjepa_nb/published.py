"""The paper's tables examined: which readings its JI and DSC allow, what its gains are, which SDs cannot be.

For one mask JI = DSC / (2 - DSC), which is convex: over many masks the mean JI lies above that of the mean DSC, and
how far above is bounded by the spread of the masks (Jensen's inequality made sharp). So one printed row says which
mixtures of classes could have made it. Everything is computed from results/paper.yaml.
"""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from .audit import BACKGROUND, CLASSES, confusion, overlaps, region_scores
from .profile import ROOT

PAPER = ROOT / "results" / "paper.yaml"
SCORES = ["DSC", "JI", "PPV", "recall"]
COLUMNS = ["method", "fraction", "DSC", "SD", "JI", "JI SD", "PPV", "PPV SD", "recall", "recall SD"]
READINGS = {  # in the mean: background in DSC? background in JI? the epicardium in place of the ring in JI?
    "the same three classes in both": (False, False, False),
    "background in both": (True, True, False),
    "background in JI alone": (False, True, False),
    "background in DSC alone": (True, False, False),
    "ring in DSC, epicardium in JI": (False, False, True),
}
HALF = 0.0005  # of the last printed digit
GAINS = {  # relative gains in DSC, %, as section 4.2 prints them: (method, over which, at % of the labels)
    ("V-JEPA + LL", "V-JEPA", 100): 1.07, ("V-JEPA (12b) + LL", "V-JEPA (12b)", 100): 3.40,
    ("V-JEPA (16b) + LL", "V-JEPA (16b)", 100): 0.7, ("V-JEPA + LL", "V-JEPA", 10): 7.45,
    ("V-JEPA (12b) + LL", "V-JEPA (12b)", 10): 8.35, ("V-JEPA (16b) + LL", "V-JEPA (16b)", 10): 2.31,
    ("V-JEPA (16b)", "V-JEPA", 100): 10.8, ("V-JEPA (16b)", "V-JEPA", 10): 14.0,
}  # fmt: skip
BOLD = {(20, "recall"): "V-JEPA (16b)"}  # printed in bold, shared with the same + LL, though not the best of its column


def table2(path: str | Path = PAPER) -> pd.DataFrame:
    """Table 2: method, fraction (%), then mean and SD over test videos of the four scores."""
    return pd.DataFrame(yaml.safe_load(Path(path).read_text(encoding="utf-8"))["table2"], columns=COLUMNS)


def jaccard(dsc):
    """JI of one mask from its DSC."""
    return dsc / (2 - dsc)


def jaccard_bounds(mean, sd):
    """Least and largest mean JI of masks whose DSC has this mean and this SD; both are reached.

    Both extremes put all masks at two values of DSC: at 0 and one more for the least, at 1 and one more for the
    largest (Markov and Krein, as the third derivative of d / (2 - d) is positive).

    Raises:
        ValueError: numbers in [0, 1] cannot have that SD about that mean.
    """
    if not 0 < mean < 1 or sd**2 > mean * (1 - mean):
        raise ValueError(f"no scores in [0, 1] have mean {mean:g} and SD {sd:g}: check both against the table.")
    other = mean + sd**2 / mean
    low = mean / other * jaccard(other)
    other = mean - sd**2 / (1 - mean)
    share = (1 - mean) / (1 - other)  # of the masks that are not at 1
    return low, 1 - share * (1 - jaccard(other))


def least_sd(mean, ji):
    """The least SD of the masks' DSC with which a mean JI is possible; nan where none is (JI below or above both)."""
    if not jaccard(mean) <= ji <= mean < 1:
        return np.nan
    ratio = (mean - ji) / (1 - mean)
    return float(np.sqrt((1 - mean) * (mean - 2 * ratio / (1 + ratio))))


def yardstick(predictions, true):
    """Properties of predictions that a printed row does not tell and that hardly depend on the method.

    All three are in units of what is missing, 1 - mean DSC of the foreground (the ring among its classes).

    Args:
        predictions: {method: uint8 [n, T, H, W]}; `true` likewise [n, T, H, W]; frames are pooled.

    Returns:
        error: what the background misses, (least, most) over methods; epi: what the mean misses with the epicardium
        in place of the ring, likewise; spread: the largest SD (root mean square) between the classes of a video.
    """
    errors, epis, spreads = [], [], []
    for masks in predictions.values():
        counts = np.stack([confusion(p, t).sum(0) for p, t in zip(masks, true, strict=True)])
        ring, epi, background = (region_scores(overlaps(counts, regions), "dsc")
                                 for regions in (*CLASSES.values(), BACKGROUND["in"]))
        if (missing := 1 - np.nanmean(ring)) == 0:
            continue
        errors.append((1 - background.mean()) / missing)
        epis.append((1 - np.nanmean(epi)) / missing)
        spreads.append(np.sqrt(np.nanmean(np.nanvar(ring, axis=1))) / missing)
    if not errors:
        raise ValueError("every prediction equals its reference, so nothing is missing: give predictions that err.")
    return {"error": (float(min(errors)), float(max(errors))), "epi": (float(min(epis)), float(max(epis))),
            "spread": float(max(spreads))}


def implied(dsc, sd, error, epi, spread):
    """Between what the mean JI must lie under each of `READINGS`, given a printed DSC ± SD.

    Args:
        dsc, sd: mean over videos of the mean over classes, and its SD; rounding is allowed for.
        error, epi, spread: from `yardstick`. The lower end takes the SD of the videos alone; the upper end adds
            the spread between the classes of a video.

    Returns:
        DataFrame, a row for each reading, with columns low and high.
    """
    rows = {}
    for reading, (in_dsc, in_ji, epi_in_ji) in READINGS.items():
        ends = []
        for d, r, q in itertools.product((dsc - HALF, dsc + HALF), error, epi):
            fg, s = ((4 * d - 1 + r) / (3 + r), 4 * sd / (3 + r)) if in_dsc else (d, sd)  # 4 d = 3 fg + 1 - r (1 - fg)
            wide = spread * (1 - fg)
            fg, s, wide = (1 - q * (1 - fg), q * s, q * wide) if epi_in_ji else (fg, s, wide)
            pair = jaccard_bounds(fg, s)[0], jaccard_bounds(fg, np.hypot(s, wide))[1]
            ends.append([(3 * j + jaccard(1 - r * (1 - fg))) / 4 if in_ji else j for j in pair])
        rows[reading] = {"low": min(ends)[0] - HALF, "high": max(high for _, high in ends) + HALF}
    return pd.DataFrame(rows).T.rename_axis("reading")


def consistency(table, **yard):
    """`implied` for every row of `table2`: method, fraction, reading, low, JI (printed), high, fits, miss.

    `miss`: how far the printed JI lies outside; 0 where it fits.
    """
    parts = [implied(row["DSC"], row["SD"], **yard).reset_index().assign(
        method=row["method"], fraction=row["fraction"], JI=row["JI"]) for _, row in table.iterrows()]
    rows = pd.concat(parts, ignore_index=True)[["method", "fraction", "reading", "low", "JI", "high"]]
    miss = np.maximum(rows["low"] - rows["JI"], rows["JI"] - rows["high"]).clip(lower=0)
    return rows.assign(fits=miss == 0, miss=miss)


def odd_sds(table, factor=3):
    """SDs above `factor` times the median of their column: method, fraction, score, SD, median, most.

    `most` is the largest sample SD (n - 1, n = 2) that scores in [0, 1] with the printed mean can have at all.
    """
    rows = []
    for score in SCORES:
        name = "SD" if score == "DSC" else f"{score} SD"
        median = table[name].median()
        for _, row in table[table[name] > factor * median].iterrows():
            mean = row[score]
            rows.append({"method": row["method"], "fraction": row["fraction"], "score": score, "SD": row[name],
                         "median": median, "most": np.sqrt(2 * mean * (1 - mean))})
    return pd.DataFrame(rows, columns=["method", "fraction", "score", "SD", "median", "most"])


def gains(table):
    """What LL adds to the V-JEPA it belongs to: absolute for each score, and relative DSC in % (the text's kind)."""
    cells = table.set_index(["method", "fraction"])[SCORES]
    rows = []
    for base in [m for m in table["method"].unique() if f"{m} + LL" in set(table["method"])]:
        for fraction in table["fraction"].unique():
            old, new = cells.loc[(base, fraction)], cells.loc[(f"{base} + LL", fraction)]
            rows.append({"method": base, "fraction": fraction, **(new - old).round(3),
                         "DSC %": 100 * (new["DSC"] / old["DSC"] - 1)})
    return pd.DataFrame(rows)


def claims(path: str | Path = PAPER):
    """What the paper's text says about its tables, beside the tables themselves.

    Returns:
        DataFrame with columns claim (in a few words), place, found (in the tables), holds ("not claimed" marks what is
        only there for comparison).
    """
    paper, table = yaml.safe_load(Path(path).read_text(encoding="utf-8")), table2(path)
    cells, change, rows = table.set_index(["method", "fraction"])[SCORES], gains(table), []

    def add(claim, place, good, of):
        holds = "not claimed" if not place else "yes" if good == of else "no"
        rows.append({"claim": claim, "place": place, "found": f"{good} of {of}", "holds": holds})

    lams, *by_method = paper["table1"].values()
    add("the best λ is 0.25", "4.1", sum(lams[np.argmax(row)] == 0.25 for row in by_method), len(by_method))
    pretrained = cells.index.get_level_values("method").str.startswith("V-JEPA")
    least, most = cells[pretrained].groupby("fraction").min(), cells[~pretrained].groupby("fraction").max()
    for score in SCORES:
        add(f"every V-JEPA above both baselines, {score} (shares of labels)", "4.2",
            (least > most)[score].sum(), len(most))
    dsc = cells["DSC"]
    exact = [abs(100 * (dsc[new, f] / dsc[old, f] - 1) - stated) < 0.1 for (new, old, f), stated in GAINS.items()]
    add("gains in DSC as printed, if they are relative", "4.2", sum(exact), len(exact))  # 0.1: the table is rounded
    p_values = paper["p_values"]
    tested = change["fraction"].isin(p_values)
    add("LL improves DSC, where a p is printed", "4.2", (change[tested]["DSC"] > 0).sum(), tested.sum())
    add("LL improves DSC, where none is", "", (change[~tested]["DSC"] > 0).sum(), (~tested).sum())
    below = [p < 0.05 for by in p_values.values() for p in by.values()]
    add("p < 0.05", "4.2", sum(below), len(below))
    add("similar improvement in JI", "4.2", (change["JI"] > 0).sum(), len(change))
    lead = (change["recall"] - change["PPV"]).groupby(change["fraction"]).mean()
    add("LL improves recall more than PPV", "4.2", (change["recall"] > change["PPV"]).sum(), len(change))
    add("recall's lead over PPV larger at 10 % than at 100 %", "4.2", int(lead[10] > lead[100]), 1)
    for (fraction, score), method in BOLD.items():
        column = cells.xs(fraction, level="fraction")[score]
        add(f"in bold: the best {score} at {fraction} %", "Table 2", int(column[method] == column.max()), 1)
    return pd.DataFrame(rows)
