"""`python -m hf_diffusionblocks`: the same as the command `diffusionblocks`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
