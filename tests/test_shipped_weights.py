"""The files in weights/: small, half precision, in the published layouts, and taken up whole by their profile."""
import json

import pytest
import torch

from usjepa_nb import objectives, weights
from usjepa_nb.profile import ROOT, load

PAIRS = {"weights": "", "weights_ti": "-ti"}  # profile that made them -> suffix of the names


@pytest.mark.parametrize("profile, suffix", PAIRS.items())
@pytest.mark.parametrize("method, built", [("videomae", "VideoMAE"), ("vjepa", "VJEPA")])
def test_every_key_finds_its_place_and_the_features_are_not_those_of_random_weights(profile, suffix, method, built):
    path, p = ROOT / "weights" / f"{method}-phantom{suffix}.pt", load(profile, init_videomae="random", init="random")
    assert path.stat().st_size <= 25e6
    assert json.loads((ROOT / "weights" / f"about{suffix}.json").read_text())["profile"] == profile
    encoder = objectives.make_encoder(p, p.frames, p.decoder_positions if method == "videomae" else "sincos3d")
    before = {name: q.clone() for name, q in encoder.named_parameters()}
    parts = {"predictor": objectives.VJEPA(p, p.frames, encoder, 1.0, 0).predictor} if method == "vjepa" else {
        "decoder": objectives.VideoMAE(p, p.frames, encoder).decoder}
    reports = weights.load(path, encoder, **parts)
    assert len(reports) == 2 and all(report.used for report in reports)
    assert all(not torch.equal(q, before[name]) for name, q in encoder.named_parameters())
    stored = weights.read(path)
    state = stored["model"] if method == "videomae" else stored["target_encoder"]
    assert {v.dtype for v in state.values()} == {torch.float16}
    with torch.no_grad():
        z = encoder(torch.randn(1, 1, p.frames, p.size, p.size, generator=torch.Generator().manual_seed(0)))
    assert torch.isfinite(z).all() and float(z.std()) > 0.1
