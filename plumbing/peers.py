"""Autoencoders of others, to be measured beside ours."""
import os
from types import SimpleNamespace

import torch

from plumbing.process import first_line

PEERS = ("AutoencoderKL", "AutoencoderDC")                   # diffusers' classes: Stable Diffusion's and its kin; DC-AE


class Peer(torch.nn.Module):
    """An autoencoder of diffusers' as `evaluate` takes a model; it decodes in one step and without noise.

    name    a folder with config.json and weights, or of the Hugging Face hub owner/repo or owner/repo/folder
    raises  ValueError where diffusers is missing, or there is no such autoencoder
    """

    def __init__(self, name):
        super().__init__()
        try:
            import diffusers
        except ImportError:
            raise ValueError("--peer needs diffusers: pip install diffusers") from None
        self.name, folder = name, None
        if name.count("/") > 1 and not os.path.isdir(name):
            owner, repo, folder = name.split("/", 2)
            name = f"{owner}/{repo}"
        try:
            config = diffusers.AutoencoderKL.load_config(name, subfolder=folder)
            kind = config.get("_class_name")
            if kind in PEERS:
                self.network = getattr(diffusers, kind).from_pretrained(name, subfolder=folder, low_cpu_mem_usage=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"--peer {self.name} is no folder and not on the Hugging Face hub, or cannot be read "
                             f"({first_line(error)})") from None
        if kind not in PEERS:
            raise ValueError(f"--peer {self.name} is of diffusers' class {kind}, not of {' or '.join(PEERS)}")
        self.config = dict(config)
        widths = config.get("block_out_channels") or config["encoder_block_out_channels"]
        self.downscale, self.z_dim = 2 ** (len(widths) - 1), config["latent_channels"]

    def encode(self, x):
        """Anything with mode(), the latents (B, c, H/f, W/f)."""
        output = self.network.encode(x.to(self.network.dtype))
        if "latent_dist" in output:
            return output.latent_dist
        return SimpleNamespace(mode=lambda: output.latent)

    def sample(self, z, steps, noise):
        return self.network.decode(z.to(self.network.dtype)).sample, torch.ones(len(z))

    def latent_shape(self, height, width):
        return self.z_dim, height // self.downscale, width // self.downscale
