"""Weights as other people publish them: their layouts -> our names and configuration.

Read are DC-AE's encoders (the original repository's names and diffusers'), the KL-VAE encoders of latent diffusion,
diffusers, FLUX, FLUX.2 and VA-VAE, SSDD's decoder, and DC-SSDAE's.

`sizes` is a table {decoder size: (widths of its four levels, number of its transformer blocks)}.
"""
import re

import torch
import torch.nn.functional as F

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "ema", "params")  # keys around the tensors of files
PREFIX = re.compile(r"^((module|_orig_mod|model|first_stage_model|vae)\.)+")
NO_BIAS = -1e4  # The bias of an offset that a smaller window in a file does not have: its exp is 0 in every precision.
UNKNOWN = "?"   # The size of a decoder that is none of `sizes`.

# Published names -> ours. The decoder's come from the diffusers library, dc's from the DC-AE repository, vq's from
# latent-diffusion's.
RENAMES = [(re.compile(pattern), name) for pattern, name in (
    (r"^decoder\.time_embedding\.linear_(\d)\.", lambda m: f"decoder.time.{2 * int(m[1]) - 2}."),
    (r"^decoder\.conv_in_img\.", "decoder.conv_in_x."),
    (r"^decoder\.batch_norm_z\.", "decoder.norm_z."),
    (r"^decoder\.ada_ctx_proj\.", "decoder.context."),
    (r"^decoder\.conv_norm_out\.", "decoder.norm_out."),
    (r"^decoder\.(down|up)_blocks\.(\d)\.resnets\.", r"decoder.\1.\2."),
    (r"^decoder\.down_blocks\.(\d)\.downsamplers\.0\.conv\.", r"decoder.down.\1.2."),
    (r"^decoder\.up_blocks\.(\d)\.upsamplers\.0\.conv\.", r"decoder.up.\1.3."),
    (r"\.ctx_proj\.", ".proj."), (r"\.conv_shortcut\.|\.nin_shortcut\.", ".shortcut."),
    (r"\.time_emb_proj\.", ".time."),
    (r"^decoder\.mid_block\.(norm|proj_in|proj_out)\.", lambda m: f"decoder.mid_{m[1].removeprefix('proj_')}."),
    (r"^decoder\.mid_block\.transformer_blocks\.", "decoder.blocks."),
    (r"\.norm1\.linear\.", ".ada."), (r"^(decoder\.blocks\.\d+)\.norm2\.", r"\1.norm."),
    (r"\.attn1\.to_([qkv])\.", r".attn.\1."), (r"\.attn1\.out_proj\.", ".attn.out."),
    (r"\.relative_position_bias\.relative_bias_table$", ".attn.bias_table"),
    (r"\.ff\.proj_in_act\.proj\.", ".mlp_in."), (r"\.ff\.proj_out\.", ".mlp_out."),
    # dc and dcae: the DC-AE repository, then diffusers' AutoencoderDC
    (r"^encoder\.project_in\.conv\.", "encoder.conv_in."),
    (r"^encoder\.project_out\.(main\.)?op_list\.0\.conv\.", "encoder.conv_out."),
    (r"^encoder\.stages\.(\d+)\.op_list\.(\d+)\.", r"encoder.stages.\1.\2."),
    (r"^encoder\.down_blocks\.(\d+)\.(\d+)\.", r"encoder.stages.\1.\2."),
    (r"^(encoder\.stages\.\d+\.\d+)\.(context_module\.main|attn)\.", r"\1.0."),
    (r"^(encoder\.stages\.\d+\.\d+)\.(local_module\.main|conv_out)\.", r"\1.1."),
    (r"^(encoder\.stages\.\d+\.\d+)\.main\.", r"\1."),
    (r"\.(proj|conv2|point_conv)\.norm\.|\.norm_out\.(?=weight$|bias$)(?<=\.0\.norm_out\.)", ".norm."),
    (r"\.(inverted|depth|point)_conv\.conv\.|\.conv_(inverted|depth|point)\.", lambda m: f".{m[1] or m[2]}."),
    (r"\.(conv1|conv2|conv|qkv|proj)\.conv\.(?=weight$|bias$)", r".\1."),
    (r"\.aggreg\.", ".aggregate."), (r"\.to_qkv_multiscale\.(\d)\.proj_(in|out)\.",
     lambda m: f".aggregate.{m[1]}.{int(m[2] == 'out')}."),
    (r"^(encoder\.stages\..*)\.to_out\.", r"\1.proj."),
    # vq: latent-diffusion, then diffusers' AutoencoderKL
    (r"^(encoder\.down\.\d)\.block\.", r"\1."), (r"^(encoder\.down\.\d)\.downsample\.conv\.", r"\1.2."),
    (r"^encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1."),
    (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0\.conv\.", r"encoder.down.\1.2."),
    (r"^encoder\.mid\.block_([12])\.", lambda m: f"encoder.mid.{2 * int(m[1]) - 2}."),
    (r"^encoder\.mid_block\.resnets\.([01])\.", lambda m: f"encoder.mid.{2 * int(m[1])}."),
    (r"^encoder\.(mid\.attn_1|mid_block\.attentions\.0)\.", "encoder.mid.1."),
    (r"^encoder\.mid\.1\.group_norm\.", "encoder.mid.1.norm."),
    (r"^encoder\.mid\.1\.(to_)?([qkv])(uery|ey|alue)?\.", r"encoder.mid.1.\2."),
    (r"^encoder\.mid\.1\.(proj_out|proj_attn|to_out\.0)\.", "encoder.mid.1.out."),
    (r"^encoder\.conv_norm_out\.", "encoder.norm_out."),
    (r"^(encoder\.out_proj|quant_conv|encoder\.quant_conv)\.", "encoder.quant."),
    (r"^encoder\.down\.(\d)\.attn\.([01])\.", r"encoder.attend.\1.\2."),
    (r"^encoder\.down_blocks\.(\d)\.attentions\.([01])\.", r"encoder.attend.\1.\2."),
    (r"^(encoder\.attend\.\d\.\d)\.group_norm\.", r"\1.norm."),
    (r"^(encoder\.attend\.\d\.\d)\.to_([qkv])\.", r"\1.\2."),
    (r"^(encoder\.attend\.\d\.\d)\.(proj_out|to_out\.0)\.", r"\1.out."),
    (r"^bn\.running_(mean|var)$", r"encoder.fold_\1"),  # FLUX.2
)]

# Weights of linear layers that are 1x1 convolutions here: the encoders' attention.
LINEAR_AS_CONVOLUTION = re.compile(
    r"encoder\.(mid\.1|attend\.\d\.\d|stages\..*\.0)\.(q|k|v|out|to_[qkv]|proj)\.weight$")


# ---------------------------------------------------------------------------------------------------------------------
# Names

def table_of_tensors(contents, path):
    """What read_tensors found in the file `path` -> {name: tensor}, without the dicts around it (WRAPPERS) and the
    prefixes of names (PREFIX). ValueError where there is no such table, or more than one."""
    while isinstance(contents, dict) and not any(isinstance(value, torch.Tensor) for value in contents.values()):
        inner = [name for name in WRAPPERS if isinstance(contents.get(name), dict)]
        if "state_dict" in inner:
            inner = ["state_dict"]
        if len(inner) > 1:
            raise ValueError(f"{path} holds several tables of tensors ({', '.join(inner)}), as a checkpoint of "
                             "training does: give the model's own file, as train.py's model.safetensors")
        if not inner:
            break
        contents = contents[inner[0]]
    if not isinstance(contents, dict) or not all(isinstance(value, torch.Tensor) for value in contents.values()):
        raise ValueError(f"{path} does not hold a flat table of tensors")
    return {PREFIX.sub("", name): value for name, value in contents.items()}


def our_names(state):
    """State dict of any known layout -> our names; separate q, k, v and linear layers become our convolutions."""
    out = {}
    for name, value in state.items():
        for pattern, ours in RENAMES:
            name = pattern.sub(ours, name)
        if value.ndim == 2 and LINEAR_AS_CONVOLUTION.match(name):
            value = value[:, :, None, None]
        out[name] = value
    for name in [name for name in out if name.startswith("encoder.stages.") and name.endswith(".to_q.weight")]:
        q, k, v = (out.pop(name.replace("to_q", f"to_{letter}")) for letter in "qkv")
        out[name.replace("to_q", "qkv")] = torch.cat([q, k, v])
    return out


def widened(state, window):
    """The state dict with tables of biases for this attention window, where they are of a smaller one."""
    out = dict(state)
    for name, table in state.items():
        if name.endswith("bias_table") and len(table) < window:
            pad = (window - len(table)) // 2
            out[name] = F.pad(table, (0, 0, pad, pad, pad, pad), value=NO_BIAS)
    return out


def unfolded(state, enc):
    """FLUX.2's file serves two encoders: the one of its folded, normalised latents, and the network before, which is
    meant where that is `enc`."""
    plain = {name: value for name, value in state.items() if not name.startswith("encoder.fold_")}
    return plain if infer_encoder(plain).get("enc") == enc else state


# ---------------------------------------------------------------------------------------------------------------------
# Configuration

def infer_config(state, sizes):
    """The arguments of model.DCSSDAE that a state dict (our names) tells by its names and shapes; {} of nothing known.
    A published decoder's output is the field itself, and nothing published has a linear code."""
    return infer_encoder(state) | infer_decoder(state, sizes)


def rows_of(state):
    """Output channels of every tensor."""
    return {name: len(value) for name, value in state.items() if value.ndim}


def infer_encoder(state):
    rows = rows_of(state)
    stem, out = rows.get("encoder.conv_in.weight"), rows.get("encoder.conv_out.weight")
    halving_stem = rows.get("encoder.conv_in.conv.weight")  # where stage 0 has no block
    levels = {name.split(".")[2] for name in rows if name.startswith("encoder.down.")}
    stages = {name.split(".")[2] for name in rows if name.startswith("encoder.stages.")}
    plain = {"linear_encoder": False, "latents": None}
    if stem and out and levels:
        f, c, options = 2 ** (len(levels) - 1), out // 2, {}
        if "encoder.quant.weight" not in rows:
            options["quant"] = False
        if any(name.startswith("encoder.attend.") for name in rows):
            options["kl_f16"] = True
        if "encoder.fold_mean" in rows:
            options["fold"] = True
            f, c = 2 * f, 4 * c
        return plain | {"enc": f"vq_f{f}c{c}", "enc_width": stem / 128, "enc_options": options}
    if not out or not stages:
        return {}
    f = 2 ** max(map(int, stages))
    has_attention = any(".qkv." in name for name in rows)
    if has_attention and stem:
        return plain | {"enc": f"dcae_f{f}c{out}_sana", "enc_width": stem / 128, "enc_options": {}}
    if not halving_stem:
        return {}
    if has_attention:
        return plain | {"enc": f"dcae_f{f}c{out}", "enc_width": halving_stem / 64, "enc_options": {}}
    has_norms = any(name.startswith("encoder.") and ".norm." in name for name in rows)
    options = {} if has_norms else {"norm": False}
    return plain | {"enc": f"dc_f{f}c{out // 2}", "enc_width": halving_stem / 64, "enc_options": options}


def infer_decoder(state, sizes):
    rows = rows_of(state)
    widths = [rows.get(f"decoder.down.{i}.0.conv1.weight") for i in range(4)]
    if not all(widths) or "decoder.context.0.weight" not in rows:
        return {}
    blocks = sum(name.endswith(".attn.bias_table") for name in rows)
    size, depth = UNKNOWN, blocks
    for name, (size_widths, size_blocks) in sizes.items():  # no two have the same widths
        if list(size_widths) == widths:
            size = name
            if size_blocks == blocks:
                depth = None  # the size's own
    return {"dec": size, "depth": depth, "loss": "fm" if "decoder.time.0.weight" in rows else "eqm",
            "joint_input": "decoder.conv_in_x.weight" not in rows, "input_skip": False, "linear_decoder": 0}


def describe(state, sizes):
    """What a state dict (our names) holds, in words."""
    config, words = infer_config(state, sizes), []
    if "enc" in config:
        options = config["enc_options"]
        variants = ""
        for name, value, word in (("norm", False, ", without norms"), ("quant", False, ", without quant_conv"),
                                  ("kl_f16", True, ", kl-f16"), ("fold", True, ", folded")):
            if options.get(name) == value:
                variants += word
        words.append(f"an encoder {config['enc']} (width {config['enc_width']:g}{variants})")
    if "dec" in config:
        depth = "" if config["depth"] is None else f", {config['depth']} blocks"
        channels = state["decoder.context.0.weight"].shape[1]
        words.append(f"a decoder of size {config['dec']} ({config['loss']}{depth}, latents of {channels} channels)")
    return " and ".join(words) or "no encoder or decoder in a known layout"
