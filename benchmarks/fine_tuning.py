"""Compare the cost of a linear probe, of low-rank updates and of training all weights: seconds and memory per step.

python benchmarks/fine_tuning.py [--model vit_small14] [--size 336x168] [--images 16] [--rank 8] [--rounds 5]

The images are phantoms, the weights random: neither changes the cost. The three ways take turns in each round, so that
other load on the machine meets all of them; the ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from vitmodel.config import Size
from vitmodel.model.architecture import PRESETS, NetworkConfig
from vitmodel.model.low_rank import add_low_rank_updates
from vitmodel.model.network import Network
from vitmodel.model.packed_batch import PackedBatch, pack_images
from vitmodel.phantoms.dataset import crop_phantom, sample_phantom
from vitmodel.training.optimizer import parameter_groups


class Way:
    """One way of fine-tuning, with its own copy of the network.

    Args:
        name: "probe", "lora" or "all".
        network: Configuration of the network.
        rank: Rank of the updates of "lora".
    """

    def __init__(self, name: str, network: NetworkConfig, rank: int) -> None:
        self.model = Network(network)
        if name == "lora":
            add_low_rank_updates(self.model.trunk, rank)
        if name == "probe":
            self.model.requires_grad_(False)
            self.model.trunk.head.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 1e-4, 0.05), lr=1e-4, fused=True)

    def step(self, pack: PackedBatch, labels: torch.Tensor) -> float:
        """Return the seconds of one step."""
        start = time.perf_counter()
        F.binary_cross_entropy_with_logits(self.model(pack).images[:, 0], labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def megabytes(self) -> float:
        """Memory of the weights, of their gradients and of AdamW's two moments in 32 bits."""
        held = sum(parameter.numel() for parameter in self.model.parameters())
        return 4e-6 * (held + 3 * self.trained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small14")
    parser.add_argument("--size", type=Size.parse, default=Size(336, 168))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    network = NetworkConfig(vit=replace(PRESETS[arguments.model], image_size=arguments.size))
    views = [sample_phantom(seed, seed % 2 == 1, 0.5, Size(1024, 832)) for seed in range(arguments.images)]
    crops = [crop_phantom(view, arguments.size) for view in views]
    images = [torch.from_numpy(crop[None].astype(np.float32) / 255) for crop in crops]
    pack = pack_images(images, network.vit.patch)
    labels = torch.arange(arguments.images) % 2 * 1.0
    ways = {name: Way(name, network, arguments.rank) for name in ("probe", "lora", "all")}
    seconds = {name: [way.step(pack, labels)] for name, way in ways.items()}  # the first step is a warm-up
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            seconds[name].append(way.step(pack, labels))
    full = np.array(seconds["all"][1:])
    print("way    trained parameters  MB of weights and optimizer  seconds per step  ratio to all")
    for name, way in ways.items():
        own = np.array(seconds[name][1:])
        line = f"{name:6} {way.trained:18,}  {way.megabytes:27.1f}  {np.median(own):16.2f}"
        print(f"{line}  {np.median(own / full):12.2f}")


if __name__ == "__main__":
    main()
