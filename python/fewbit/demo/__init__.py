"""The demo model: a tiny Llama in `model/`, and the text it was trained on in `fewbit.demo.text`.

`scripts/train_demo_model.py` made the model. Its outlier channels were put in on purpose, by a
rescaling that leaves its function as it is.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
