# `make demo` and `make test` set themselves up in .venv and need no data, no GPU and no questions. With
# BRATS_REAL_CASES=FOLDER both use the real cases of that folder, too.
PYTHON ?= python3
RUN = .venv/bin/python
SEED = 0

.PHONY: demo test test-all clean

demo: .venv/ready
	@$(RUN) tests/benchmarks/demo_minutes.py
	rm -rf demo models/unet/results/demo models/swinunetr/results/demo
	$(RUN) -m models.phantom demo/raw --cases 16 --first 1000
	$(RUN) view_interactive_4pane_brats.py demo/raw --save demo/case.png
	$(RUN) view_interactive_4pane_brats.py demo/raw --run unet --save demo/case_by_weights_from_patients.png
	[ -z "$$BRATS_REAL_CASES" ] || \
		$(RUN) view_interactive_4pane_brats.py "$$BRATS_REAL_CASES" --run unet --save demo/patient_by_unet.png
	$(RUN) preprocess_brats.py demo/raw demo/tensors --size 64
	$(RUN) view_interactive_4pane_brats.py demo/tensors/BraTS2021_01000.pt --save demo/preprocessed_case.png
	$(RUN) train_unet.py demo/tensors --epochs 28 --seed $(SEED) --run-name demo
	$(RUN) train_swinunetr.py demo/tensors --feature-size 12 --window-size 4 --epochs 6 --seed $(SEED) \
		--run-name demo
	$(RUN) evaluate.py models/unet/results/demo models/swinunetr/results/demo --ensemble \
		--save-nifti demo/predictions --out demo/comparison
	@echo; echo "Pictures and tables of this demo:"
	@find demo models/*/results/demo -name '*.png' -o -name '*.csv' -o -name 'summary.json' | sort | sed 's/^/  /'

test: .venv/ready-test
	$(RUN) -m ruff check .
	$(RUN) -m pytest -m "not slow"

test-all: .venv/ready-test
	$(RUN) -m ruff check .
	$(RUN) -m pytest

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-test: .venv/ready tests/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv demo .engines
