"""Samples from a checkpoint: `python scripts/sample.py --checkpoint DIR --prompt "a red fox"`."""

from torchtitan_mixtures.sampling.command import main

if __name__ == "__main__":
    main()
