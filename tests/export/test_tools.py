"""convert, merge, resize, extract: each result against the formulas, each wrong request refused before work begins."""

from __future__ import annotations

import json
import re
from pathlib import Path

import foreign_layers as foreign
import original
import pytest
import torch
from diffusers import DiffusionPipeline
from foreign_layers import changes
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import cli, export, families, keys, weights
from finetune.export import compare, formats, hashes, tools
from finetune.export.stream import Entry
from finetune.families import Source


def run(*words: object) -> None:
    cli.main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object, status: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == status
    return " ".join(capsys.readouterr().err.split())


def off(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm())


def best(matrix: Tensor, rank: int) -> float:
    """What the best approximation of this rank misses, as a share of the norm."""
    values = torch.linalg.svdvals(matrix.double())
    return float(values[rank:].norm() / values.norm())


def told(text: str) -> float:
    """The error in all layers together that a command has stated."""
    found = re.search(r"as read back: ([\d.e+-]+) of its norm", text)
    assert found, text
    return float(found[1])


class TestConvert:
    @pytest.mark.parametrize("kind", ["sd", "sdxl"])
    def test_there_and_back_gives_the_same_bits(
        self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = foreign.lora(tmp_path / "a.safetensors", kind, rank=4, alpha=3.0)
        run("convert", file, tmp_path / "b.safetensors", "--format", "diffusers")
        assert "every tensor has the same bits" in capsys.readouterr().out
        run("convert", tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--format", "kohya")
        assert "every tensor has the same bits" in capsys.readouterr().out
        names = set(load_file(tmp_path / "b.safetensors"))
        assert all(re.fullmatch(r"(unet|text_encoder(_2)?)\..+\.lora_[AB]\.weight", name) for name in names)
        mine, theirs = load_file(file), load_file(tmp_path / "c.safetensors")
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def test_half_precision_is_rounded_once_and_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = foreign.lora(tmp_path / "a.safetensors")
        run("convert", file, tmp_path / "b.safetensors", "--format", "kohya", "--precision", "fp16")
        assert "rounding error" in capsys.readouterr().out
        mine, theirs = load_file(file), load_file(tmp_path / "b.safetensors")
        assert all(torch.equal(mine[name].half(), theirs[name].half()) for name in mine)
        assert {tensor.dtype for name, tensor in theirs.items() if "lora" in name.split(".")[1]} == {torch.float16}

    def test_what_the_header_says_is_carried_over_but_for_hashes(self, tmp_path: Path) -> None:
        said = {
            "ss_base_model_version": "sd_v1",
            "ss_tag_frequency": '{"10_dog": {"sks dog": 4}}',
            "ss_sd_model_hash": "of the base",
            "ss_network_dim": "4",
            "modelspec.trigger_phrase": "sks",
            "modelspec.hash_sha256": "0xold",
            "sshs_model_hash": "old",
            "sshs_legacy_hash": "old",
            "my_folder": "/home/me",
            "finetune": json.dumps({"recipe": "lora", "rank": 4, "seed": 7}),
        }
        file = foreign.lora(tmp_path / "a.safetensors", metadata=said)
        run("convert", file, tmp_path / "b.safetensors", "--format", "diffusers")
        found = weights.read_metadata(tmp_path / "b.safetensors")
        kept = {key: said[key] for key in (*[*said][:4], "modelspec.trigger_phrase")}
        assert kept.items() <= found.items()
        assert "my_folder" not in found and "lora_adapter_metadata" in found
        assert all(claim.holds for claim in hashes.claims(tmp_path / "b.safetensors"))
        own = json.loads(found["finetune"])
        assert own["rank"] == 4 and own["seed"] == 7 and own["pipeline"] == "StableDiffusionPipeline"
        assert [done["tool"] for done in own["tools"]] == ["convert"]
        run("resize", tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--rank", 2)
        found = weights.read_metadata(tmp_path / "c.safetensors")
        own = json.loads(found["finetune"])
        assert found["ss_network_dim"] == "2" and "rank" not in own and own["seed"] == 7
        assert [done["tool"] for done in own["tools"]] == ["convert", "resize"]

    def test_a_file_that_does_not_tell_its_family_needs_the_base(
        self, tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = foreign.lora(tmp_path / "a.safetensors", metadata={})
        words = ["convert", file, tmp_path / "b.safetensors", "--format", "diffusers"]
        assert "--model" in refused(capsys, *words)
        run(*words, "--model", tiny_models["sd"])
        assert formats.read(tmp_path / "b.safetensors").family == "StableDiffusionPipeline"

    def test_a_base_of_another_family_is_refused(
        self, tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = foreign.lora(tmp_path / "a.safetensors")
        words = ["convert", file, tmp_path / "b.safetensors", "--format", "kohya", "--model", tiny_models["sdxl"]]
        said = refused(capsys, *words)
        assert "do not go together" in said and "Stable Diffusion XL" in said

    @pytest.mark.parametrize("base", [False, True])
    def test_loha_and_lokr_become_lora_by_singular_values(
        self, base: bool, tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """At full rank they are the same change; below it, the best approximation."""
        hada = {f"hada_w{n}_{half}": (8, 2) if half == "a" else (2, 8) for n in (1, 2) for half in "ab"}
        loha = {name: keys.normal(shape, 0, name) for name, shape in hada.items()}
        lokr = {"lokr_w1": keys.normal((2, 4), 0, "w1"), "lokr_w2": keys.normal((4, 4), 0, "w2")}
        query, value = [*foreign.LAYERS["sd"]][:2]
        tensors = {f"{query}.{name}": tensor for name, tensor in loha.items()} | {
            f"{value}.{name}": tensor for name, tensor in lokr.items()
        }
        tensors |= {f"{name}.alpha": torch.tensor(1.0) for name in (query, value)}
        file = foreign.save(tmp_path / "a.safetensors", tensors)
        words = ["convert", file, tmp_path / "b.safetensors", "--format", "diffusers"]
        said = refused(capsys, *words)
        assert "LoHa" in said and "--to-lora" in said and not (tmp_path / "b.safetensors").exists()
        model = ["--model", tiny_models["sd"]] if base else []
        one = 0.5 * (loha["hada_w1_a"] @ loha["hada_w1_b"]) * (loha["hada_w2_a"] @ loha["hada_w2_b"])
        wanted = {query: one, value: torch.kron(lokr["lokr_w1"], lokr["lokr_w2"])}
        for rank in (8, 2):
            out = tmp_path / f"{rank}.safetensors"
            run("convert", file, out, "--format", "kohya", "--to-lora", rank, *model)
            made = changes(out)
            for name, change in wanted.items():
                assert off(change, made[name.replace(".", "_")]) == pytest.approx(best(change, rank), abs=1e-6)

    def test_a_convolution_in_loha_tells_its_kernel_only_with_the_base(
        self, tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        name = [*foreign.LAYERS["sd"]][2]
        shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 72), "hada_w2_a": (8, 2), "hada_w2_b": (2, 72)}
        tensors = {f"{name}.{tensor}": keys.normal(shape, 0, tensor) for tensor, shape in shapes.items()}
        file = foreign.save(tmp_path / "a.safetensors", tensors)
        words = ["convert", file, tmp_path / "b.safetensors", "--format", "diffusers", "--to-lora", 4]
        assert "kernel" in refused(capsys, *words)
        run(*words, "--model", tiny_models["sd"])
        down = load_file(tmp_path / "b.safetensors")["unet.down_blocks.1.resnets.0.conv1.lora_A.weight"]
        assert down.shape == (4, 8, 3, 3)

    def test_a_core_is_multiplied_in(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Tucker: the kernel stands in the core, between two factors without one."""
        name = [*foreign.LAYERS["sd"]][2]
        shapes = {"lora_down.weight": (3, 8, 1, 1), "lora_mid.weight": (3, 3, 3, 3), "lora_up.weight": (8, 3, 1, 1)}
        half = {tensor: keys.normal(shape, 0, tensor) for tensor, shape in shapes.items()}
        file = foreign.save(tmp_path / "a.safetensors", {f"{name}.{key}": tensor for key, tensor in half.items()})
        words = ["convert", file, tmp_path / "b.safetensors", "--format", "kohya", "--to-lora", 3]
        assert "with a core" in refused(capsys, *words[:4], "diffusers")
        assert "above 3" in refused(capsys, *words[:-1], 4)
        run(*words)
        down, core, up = half.values()
        wanted = torch.einsum("op,pqhw,qi->oihw", up.flatten(1), core, down.flatten(1)).flatten(1)
        (made,) = changes(tmp_path / "b.safetensors").values()
        assert off(wanted, made) < 1e-6

    def test_dora_is_baked_with_the_base_weights(
        self, tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """m (W + dW) / ||W + dW|| - W (Liu et al. 2024, eq. 5)"""
        name = next(iter(foreign.LAYERS["sd"]))
        file = foreign.lora(tmp_path / "a.safetensors", layers=[0])
        tensors = load_file(file)
        magnitude = 1 + keys.uniform(0, "test") * torch.ones(8, 1)
        tensors[f"{name.replace('.', '_')}.dora_scale"] = magnitude
        save_file(tensors, file, {"ss_base_model_version": "sd_v1"})
        words = ["convert", file, tmp_path / "b.safetensors", "--format", "kohya"]
        assert "--model" in refused(capsys, *words, "--to-lora", 8)
        run(*words, "--to-lora", 8, "--model", tiny_models["sd"])
        weight = load_file(tiny_models["sd"] / "unet" / "diffusion_pytorch_model.safetensors")[
            f"{foreign.ATTENTION}.to_q.weight"
        ]
        (change,) = changes(foreign.lora(tmp_path / "plain.safetensors", layers=[0])).values()
        moved = weight.double() + change
        wanted = magnitude * moved / moved.norm(dim=1, keepdim=True) - weight
        (made,) = changes(tmp_path / "b.safetensors").values()
        assert off(wanted, made) < 1e-5


class TestMerge:
    @pytest.mark.parametrize("kind", ["sd", "sdxl"])
    def test_side_by_side_is_the_weighted_sum(
        self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Other ranks and alphas, a negative weight, layers of which some are in one file only."""
        one = foreign.lora(tmp_path / "a.safetensors", kind, rank=4, alpha=2.0, layers=[0, 1, 2, 3])
        two = foreign.lora(tmp_path / "b.safetensors", kind, rank=3, alpha=None, layers=[1, 2, 3, 4], seed=1)
        out = tmp_path / "c.safetensors"
        run("merge", "--adapter", one, two, "--scale", 0.8, -0.5, "--output", out)
        assert "none but rounding" in capsys.readouterr().out
        first, second, made = changes(one), changes(two), changes(out)
        assert made.keys() == first.keys() | second.keys() and len(made) == 5
        for name, change in made.items():
            wanted = 0.8 * first.get(name, torch.zeros(1)) - 0.5 * second.get(name, torch.zeros(1))
            assert off(wanted, change) < 1e-6
        ranks = {name: len(tensor) for name, tensor in load_file(out).items() if name.endswith("lora_down.weight")}
        assert sorted(ranks.values()) == [3, 4, 7, 7, 7]

    @pytest.mark.parametrize("rank", [1, 3, 6])
    def test_of_a_rank_is_the_best_approximation(
        self, rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        one = foreign.lora(tmp_path / "a.safetensors", rank=4)
        two = foreign.lora(tmp_path / "b.safetensors", rank=4, seed=1)
        out = tmp_path / "c.safetensors"
        run("merge", "--adapter", one, two, "--output", out, "--rank", rank)
        first, second, made = changes(one), changes(two), changes(out)
        missed = total = 0.0
        for name in made:
            wanted = first[name] + second[name]
            assert off(wanted, made[name]) == pytest.approx(best(wanted, rank), abs=1e-6)
            missed += float((wanted - made[name]).norm()) ** 2
            total += float(wanted.norm()) ** 2
        assert told(capsys.readouterr().out) == pytest.approx((missed / total) ** 0.5, rel=1e-2)

    def test_other_kinds_need_a_rank(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        name = next(iter(foreign.LAYERS["sd"]))
        difference = keys.normal((8, 8), 0, "test")
        one = foreign.save(tmp_path / "a.safetensors", {f"{name}.diff": difference})
        two = foreign.lora(tmp_path / "b.safetensors", layers=[0])
        words = ["merge", "--adapter", one, two, "--output", tmp_path / "c.safetensors"]
        assert "--rank" in refused(capsys, *words)
        run(*words, "--rank", 8)
        (made,), (change,) = changes(tmp_path / "c.safetensors").values(), changes(two).values()
        assert off(difference + change, made) < 1e-6

    def test_what_all_headers_say_alike_is_kept(self, tmp_path: Path) -> None:
        files = []
        for name, seed in (("a", "1"), ("b", "2")):
            said = {
                "ss_base_model_version": "sd_v1",
                "ss_seed": seed,
                "modelspec.title": name,
                "modelspec.trigger_phrase": f"{name}kk",
                "finetune": json.dumps({"seed": int(seed)}),
            }
            files.append(foreign.lora(tmp_path / f"{name}.safetensors", metadata=said))
        run("merge", "--adapter", *files, "--output", tmp_path / "c.safetensors")
        found = weights.read_metadata(tmp_path / "c.safetensors")
        own = json.loads(found.pop("finetune"))
        assert "ss_seed" not in found and found["modelspec.title"] not in ("a", "b")
        assert (
            found.items()
            >= {
                "format": "pt",
                "ss_base_model_version": "sd_v1",
                "modelspec.merged_from": "a, b",
                "modelspec.trigger_phrase": "akk, bkk",
            }.items()
        )
        assert own["sources"] == [{"seed": 1}, {"seed": 2}] and own["tools"][0]["scale"] == [1.0, 1.0]

    @pytest.mark.parametrize("form", ["kohya", "diffusers"])
    def test_diffusers_predicts_the_same_with_one_file_as_with_both(
        self, form: str, tmp_path: Path, tiny_models: dict[str, Path]
    ) -> None:
        one = foreign.lora(tmp_path / "a.safetensors", "sdxl", layers=[0, 1, 2])
        two = foreign.lora(tmp_path / "b.safetensors", "sdxl", layers=[1, 2], seed=1, rank=3)
        out = tmp_path / "c.safetensors"
        run("merge", "--adapter", one, two, "--scale", -2, 5, "--output", out, "--format", form)
        family = families.load(Source(str(tiny_models["sdxl"])))
        base = compare.prediction(family)
        for name, file in (("a", one), ("b", two)):
            export.attach(family, file, name)
        family.pipeline.set_adapters(["a", "b"], adapter_weights=[-2, 5])
        both = compare.prediction(family)
        export.attach(family, out, "c")
        family.pipeline.set_adapters(["c"])
        assert compare.difference(both, compare.prediction(family)) < 1e-5
        assert compare.difference(both, base) > 1e-3, "the adapters act"

    def test_into_the_base(self, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
        base = tiny_models["sd"]
        one = foreign.lora(tmp_path / "a.safetensors", layers=[0, 1, 2])
        two = foreign.lora(tmp_path / "b.safetensors", layers=[1], seed=1, rank=2)
        out = tmp_path / "model"
        run("merge", "--adapter", one, two, "--scale", 0.5, -2, "--output", out, "--into-base", "--model", base)
        file = Path("unet") / "diffusion_pytorch_model.safetensors"
        old, new = load_file(base / file), load_file(out / file)
        first, second, moved = changes(one), changes(two), 0
        for name, weight in old.items():
            key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            change = 0.5 * first.get(key, torch.zeros(1)) - 2 * second.get(key, torch.zeros(1))
            moved += bool(change.any())
            expected = weight.double() + (change.reshape(weight.shape) if change.any() else 0)
            assert torch.allclose(new[name].double(), expected, atol=1e-6), name
        assert moved == 3

    def test_refusals(self, tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        one = foreign.lora(tmp_path / "a.safetensors")
        other = foreign.lora(tmp_path / "b.safetensors", "sdxl")
        wide = foreign.save(
            tmp_path / "c.safetensors",
            {
                f"{next(iter(foreign.LAYERS['sd']))}.{half}": torch.ones(shape)
                for half, shape in (("lora_down.weight", (4, 9)), ("lora_up.weight", (8, 4)))
            },
        )
        out = tmp_path / "out.safetensors"
        words = ["merge", "--output", out, "--adapter", one]
        assert "do not go together" in refused(capsys, *words, other)
        assert "other shapes" in refused(capsys, *words, wide)
        assert "3 numbers for 1 adapters" in refused(capsys, *words, "--scale", 1, 2, 3)
        assert "finite" in refused(capsys, *words, "--scale", "nan")
        assert "--model" in refused(capsys, *words, "--into-base")
        assert "leave it out" in refused(capsys, *words, "--into-base", "--rank", 3)
        assert "does not fit" in refused(
            capsys, "merge", "--output", out, "--adapter", wide, "--model", tiny_models["sd"]
        )
        assert not out.exists() and not list(tmp_path.glob(".*"))


class TestResize:
    @pytest.mark.parametrize("form", ["kohya", "diffusers"])
    def test_the_best_approximation_of_a_rank(
        self, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = foreign.lora(tmp_path / "a.safetensors", "sdxl", rank=6, alpha=3.0)
        out = tmp_path / "b.safetensors"
        run("resize", file, out, "--rank", 2, "--format", form)
        if form == "diffusers":
            run("convert", out, tmp_path / "c.safetensors", "--format", "kohya")
            out = tmp_path / "c.safetensors"
        said = capsys.readouterr().out
        assert "rank 2" in said and "before:" in said
        wanted, made = changes(file), changes(out)
        for name, change in wanted.items():
            assert off(change, made[name]) == pytest.approx(best(change, 2), abs=1e-6)
        missed = sum(float((change - made[name]).norm()) ** 2 for name, change in wanted.items())
        total = sum(float(change.norm()) ** 2 for change in wanted.values())
        assert told(said) == pytest.approx((missed / total) ** 0.5, rel=1e-2)

    @pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
    def test_the_least_ranks_that_keep_the_energy(self, energy: float, tmp_path: Path) -> None:
        file = foreign.lora(tmp_path / "a.safetensors", rank=6)
        run("resize", file, tmp_path / "b.safetensors", "--energy", energy)
        ranks = {layer.name: layer.rank for layer in formats.read(tmp_path / "b.safetensors")}
        for layer in formats.read(file):
            squares = torch.linalg.svdvals(layer.change().double()).square()
            share = squares.cumsum(0) / squares.sum()
            rank = ranks[layer.name]
            assert rank is not None and float(share[rank - 1]) >= energy - 1e-9
            assert rank == 1 or float(share[rank - 2]) < energy

    def test_energy_with_a_highest_rank(self, tmp_path: Path) -> None:
        file = foreign.lora(tmp_path / "a.safetensors", rank=6)
        run("resize", file, tmp_path / "b.safetensors", "--energy", 0.999, "--rank", 3)
        assert {layer.rank for layer in formats.read(tmp_path / "b.safetensors")} == {3}

    def test_half_precision_stays_half_and_the_error_says_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = foreign.lora(tmp_path / "a.safetensors", dtype=torch.float16)
        run("resize", file, tmp_path / "b.safetensors", "--rank", 4)
        assert 1e-5 < told(capsys.readouterr().out) < 1e-3
        kept = {tensor.dtype for name, tensor in load_file(tmp_path / "b.safetensors").items() if "alpha" not in name}
        assert kept == {torch.float16}

    def test_the_same_bytes_again(self, tmp_path: Path) -> None:
        file = foreign.lora(tmp_path / "a.safetensors")
        run("resize", file, tmp_path / "b.safetensors", "--rank", 2)
        run("resize", file, tmp_path / "c.safetensors", "--rank", 2)
        assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()

    def test_refusals(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file, out = foreign.lora(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
        words = ["resize", file, out]
        assert "--rank" in refused(capsys, *words)
        assert "at least 1" in refused(capsys, *words, "--rank", 0)
        assert "above 4" in refused(capsys, *words, "--rank", 5)
        for energy in (0, -0.5, 1.01, "nan"):
            assert "--energy" in refused(capsys, *words, "--energy", energy)
        assert "already" in refused(capsys, "resize", file, file, "--rank", 2)
        (tmp_path / "d.safetensors").mkdir()
        assert "folder" in refused(capsys, "resize", file, tmp_path / "d.safetensors", "--rank", 2)
        assert ".safetensors" in refused(capsys, "resize", file, tmp_path / "b.pt", "--rank", 2)
        assert "no such file" in refused(capsys, "resize", tmp_path / "none.safetensors", out, "--rank", 2)
        save_file({"conv.weight": torch.ones(3)}, tmp_path / "none.safetensors")
        assert "no adapter" in refused(capsys, "resize", tmp_path / "none.safetensors", out, "--rank", 2)
        assert not out.exists() and not list(tmp_path.glob(".*"))

    def test_tensors_that_do_not_fit_each_other(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        name = next(iter(foreign.LAYERS["sd"]))
        tensors = {f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.lora_up.weight": torch.ones(8, 3)}
        file = foreign.save(tmp_path / "a.safetensors", tensors)
        assert "do not go together" in refused(capsys, "resize", file, tmp_path / "b.safetensors", "--rank", 2)


class TestExtract:
    @pytest.fixture
    def tuned(self, tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
        """The tiny SD model with a LoRA and LoCon of rank 3 added to its weights."""
        return add(tiny_models["sd"], foreign.lora(tmp_path / "lora.safetensors", rank=3), tmp_path / "tuned")

    @pytest.mark.parametrize("form", ["folder", "single"])
    def test_a_change_of_that_rank_is_recovered(
        self, form: str, tuned: Path, tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, out = tiny_models["sd"], tmp_path / "out.safetensors"
        if form == "single":
            base, tuned = (single(model, tmp_path / f"{n}.safetensors") for n, model in enumerate((base, tuned)))
        run("extract", "--model", base, "--tuned", tuned, "--output", out, *CONFIGS[form](tiny_models["sd"]),
            "--rank", 3, "--layers", "all", "--precision", "fp32")  # fmt: skip
        wanted, made = changes(tmp_path / "lora.safetensors"), changes(out)
        text = {name for name in made if name.startswith("lora_te_")}
        assert made.keys() - text == wanted.keys() - text
        assert len(text) == 12, "a text encoder is taken whole: some clients read no part of its attention alone"
        for name, change in made.items():
            assert off(wanted[name], change) < 1e-5 if name in wanted else not change.any()
        assert "not in the file" not in capsys.readouterr().out

    def test_the_second_text_encoder_of_a_single_file(self, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
        """OpenCLIP holds q, k and v in one matrix."""
        base, out = tiny_models["sdxl"], tmp_path / "out.safetensors"
        lora = foreign.lora(tmp_path / "lora.safetensors", "sdxl", rank=3)
        tuned = single(add(base, lora, tmp_path / "tuned"), tmp_path / "tuned.safetensors")
        run("extract", "--model", base, "--tuned", tuned, "--tuned-config", base, "--output", out,
            "--rank", 3, "--layers", "all", "--precision", "fp32")  # fmt: skip
        wanted, made = changes(lora), changes(out)
        assert wanted.keys() <= made.keys()
        for name, change in made.items():
            assert off(wanted[name], change) < 1e-5 if name in wanted else not change.any()

    def test_the_layers_of_adapters_and_what_is_left_out(
        self, tuned: Path, tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out.safetensors"
        run("extract", "--model", tiny_models["sd"], "--tuned", tuned, "--output", out, "--rank", 3)
        wanted, made = changes(tmp_path / "lora.safetensors"), changes(out)
        assert len(made) == 2 and all(name.endswith(("to_q", "to_v")) for name in made)
        assert all(off(wanted[name], change) < 1e-3 for name, change in made.items()), "fp16 by default"
        others = sum(float(change.norm()) ** 2 for name, change in wanted.items() if name not in made)
        share = (others / sum(float(change.norm()) ** 2 for change in wanted.values())) ** 0.5
        said = re.search(r"not in the file: (\d+) other tensors, ([\d.]+) of", capsys.readouterr().out)
        assert said and int(said[1]) == 3 and float(said[2]) == pytest.approx(share, rel=1e-2)
        assert formats.read(out).family == "StableDiffusionPipeline"

    def test_by_energy(self, tuned: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
        out = tmp_path / "out.safetensors"
        run("extract", "--model", tiny_models["sd"], "--tuned", tuned, "--output", out, "--energy", 0.99999999)
        assert {layer.rank for layer in formats.read(out)} == {3}

    def test_refusals(
        self, tuned: Path, tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        base, out = tiny_models["sd"], tmp_path / "out.safetensors"
        words = ["extract", "--output", out, "--tuned"]
        assert "--rank" in refused(capsys, *words, tuned, "--model", base)
        assert "--model" in refused(capsys, *words, tuned, "--rank", 2)
        assert "the same as" in refused(capsys, *words, base, "--model", base, "--rank", 2)
        assert "do not go together" in refused(capsys, *words, tuned, "--model", tiny_models["sdxl"], "--rank", 2)
        assert "not built as" in refused(capsys, *words, "toybox", "--model", base, "--rank", 2)
        assert "above 8" in refused(capsys, *words, tuned, "--model", base, "--rank", 17)
        assert "model_index.json" in refused(capsys, *words, tmp_path, "--model", base, "--rank", 2)
        assert not out.exists() and not list(tmp_path.glob(".*"))


CONFIGS = {"folder": lambda model: [], "single": lambda model: ["--model-config", model, "--tuned-config", model]}


def add(base: Path, lora: Path, folder: Path) -> Path:
    """A LoRA added to a model's weights, here, by its formula."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    for layer in formats.read(lora):
        module = getattr(pipeline, layer.part)
        names = dict(module.named_modules())
        own = names.get(layer.path) or names[layer.path.removeprefix("text_model.")]
        own.weight.data += layer.change().reshape(own.weight.shape)
    pipeline.save_pretrained(folder)
    return folder


def single(folder: Path, file: Path) -> Path:
    return original.save(DiffusionPipeline.from_pretrained(folder), file)


@pytest.mark.parametrize(
    "words",
    [["convert", "IN", "OUT", "--format", "diffusers"], ["resize", "IN", "OUT", "--rank", "2"],
     ["merge", "--adapter", "IN", "--output", "OUT"]],
)  # fmt: skip
def test_a_file_that_does_not_read_back_equal_is_not_left(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = foreign.lora(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    out.write_bytes(b"what was there")
    entry = formats.Layer.entry

    def damaged(layer: formats.Layer, tensor: str, *rest: object) -> Entry:
        made = entry(layer, tensor, *rest)  # type: ignore[arg-type]
        wrong = layer.path.endswith("to_v") and tensor == "lora_up.weight"
        return Entry(made.shape, made.dtype, lambda: made.make() * (1.01 if wrong else 1.0))

    monkeypatch.setattr(formats.Layer, "entry", damaged)
    said = refused(capsys, *[{"IN": file, "OUT": out}.get(word, word) for word in words], "--overwrite", status=1)
    assert "does not hold" in said and "attn2.to_v" in said and "to_q" not in said
    assert out.read_bytes() == b"what was there" and not list(tmp_path.glob(".*"))


def test_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's halves are computed once, and read from the sources once for each of writing and checking."""
    from finetune.export import lowrank

    file, computed = foreign.lora(tmp_path / "a.safetensors"), []
    of_product = lowrank.of_product

    def counted(*halves: Tensor) -> lowrank.Decomposed:
        computed.append(halves)
        return of_product(*halves)

    monkeypatch.setattr(lowrank, "of_product", counted)
    tools.combine([(file, 1.0)], tmp_path / "b.safetensors", "kohya", tools.Rule(rank=2), tool="resize")
    assert len(computed) == 5
