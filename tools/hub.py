"""A run's folder to the Hugging Face Hub, and back. Needs the huggingface_hub package, which timm brings.

    python -m tools.hub upload runs/tiny_eqm OWNER/NAME
    python -m tools.hub download OWNER/NAME runs/tiny_eqm

Uploads the models, the log, the numbers and the pictures, not the checkpoints; it needs `hf auth login` or HF_TOKEN.
Afterwards the model is hf://OWNER/NAME/model.safetensors for every program.
"""
import argparse
import os

from data import guarded

FILES = ["*.safetensors", "*.json", "*.jsonl", "*.png", "README.md"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["upload", "download"])
    parser.add_argument("source", help="upload: a run's folder; download: OWNER/NAME")
    parser.add_argument("target", help="upload: OWNER/NAME; download: a folder")
    args = parser.parse_args()
    if args.action == "upload" and not os.path.exists(os.path.join(args.source, "model.safetensors")):
        raise ValueError(f"{args.source} holds no model.safetensors: give the folder of a run that has ended")
    try:
        import huggingface_hub as hub
        if args.action == "upload":
            hub.create_repo(args.target, exist_ok=True)
            hub.upload_folder(folder_path=args.source, repo_id=args.target, allow_patterns=FILES)
        else:
            hub.snapshot_download(args.source, local_dir=args.target, allow_patterns=FILES)
    except Exception as error:  # noqa: BLE001 the hub client raises many classes
        raise ValueError(f"{args.action} failed ({type(error).__name__}: {' '.join(str(error).split())[:300]}): see "
                         f"https://huggingface.co/docs/huggingface_hub") from None
    print(f"{args.action}ed {args.source} -> {args.target}")


if __name__ == "__main__":
    guarded(main)
