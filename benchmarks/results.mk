# Every recorded result, made again: many hours. A file that is there is not made again, so an interrupted run
# goes on, and `make results ROWS=store.json` makes one alone. Some need data that nothing here brings:
#
#   TREEDIFF_DATA   a folder that holds mnist/ (and fashion-mnist/, if the Debian package is not installed)
#   CIFAR           an .npz file with a part of CIFAR-10
#   FEATURES        files of examples/embed.py: pneumonia.npz, banking.npz, ham.npz, flowers.npz, cifar.npz, adult.npz
#                   and fashion-{seed}.npz
#   HAM, PNEUMONIA  .npz files with images of HAM10000 and PneumoniaMNIST
#   FLOWERS         an .npz file with images of Oxford Flowers
#
# Rows that need what is not given are left out. Times mean something only if nothing else runs.

PYTHON ?= python
OUT ?= build/results
RUNS ?= build/runs
FORGETTING := $(PYTHON) benchmarks/forgetting.py
CIFAR_KEYS = --data $(CIFAR) --encoder efficientnet --epochs 20 --keys $(RUNS)/cifar-keys.npz
AS_LIST := $(PYTHON) -c 'import json, sys; print(json.dumps([json.load(open(path)) for path in sys.argv[1:]]))'
UNLEARNING := OMP_NUM_THREADS=1 $(PYTHON) examples/unlearning_benchmark.py
FASHION_PAIR := $(RUNS)/fashion-diffusion/model.safetensors

TREES := fashion-mnist-0 fashion-mnist-1 fashion-mnist-20-leaves
NUMBERS := treevae_step treevae_step_one_thread treevae_vectors digits_starts fashion_diffusion fashion_generation \
	fashion_conditions sampler_steps unet_step forgetting_fashion forgetting_fashion_exact deletion_requests \
	shadow_models distributed store store_model reliability memory
UNLEARNT := fashion
OTHER_SETS := cifar-class cifar-cluster cifar-one-percent
ifdef TREEDIFF_DATA
TREES += mnist-0 mnist-1
NUMBERS += shapes mnist_diffusion mnist_generation forgetting_fashion_encoder
endif
ifdef CIFAR
NUMBERS += forgetting_cifar_own_1 forgetting_cifar_kinds forgetting_cifar_exact forgetting_cifar_own_half \
	forgetting_cifar_own_0 forgetting_cifar_softmax forgetting_cifar_rank forgetting_cifar_no_dropout \
	forgetting_cifar_no_memory cifar10-part cifar10-part-contrastive trees_contrastive
UNLEARNT += cifar $(OTHER_SETS) cifar-leakage
endif
ifdef FEATURES
NUMBERS += readouts $(if $(filter %cifar.npz,$(FEATURES)),trees_features) $(if $(filter %flowers.npz %banking.npz,$(FEATURES)),new_classes)
UNLEARNT += $(patsubst %.npz,features-%,$(subst -{seed},,$(notdir $(FEATURES))))
endif
ifdef HAM
NUMBERS += forgetting_ham forgetting_ham_own_1 forgetting_ham_gradient
endif
ifdef PNEUMONIA
NUMBERS += forgetting_pneumonia forgetting_pneumonia_own_1 forgetting_pneumonia_gradient
endif
ifdef FLOWERS
NUMBERS += flowers_sizes
endif
ROWS ?= $(TREES:%=%.json) $(NUMBERS:%=%.json) $(UNLEARNT:%=unlearning/%/table.md)

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: all
.SECONDARY:
all: $(ROWS:%=$(OUT)/%)

$(OUT)/%: | $(OUT)/unlearning $(RUNS)
$(OUT)/unlearning $(RUNS):
	mkdir -p $@

# --- trees ----------------------------------------------------------------------------------------------------

$(OUT)/fashion-mnist-20-leaves.json:
	$(PYTHON) examples/train_treevae.py --data fashion-mnist --leaves 20 --seed 0 --out $(RUNS)/fashion-20
	cp $(RUNS)/fashion-20/results.json $@
$(OUT)/fashion-mnist-%.json:
	$(PYTHON) examples/train_treevae.py --data fashion-mnist --seed $* --out $(RUNS)/fashion-$*
	cp $(RUNS)/fashion-$*/results.json $@
$(OUT)/mnist-%.json:
	$(PYTHON) examples/train_treevae.py --data mnist --seed $* --out $(RUNS)/mnist-$*
	cp $(RUNS)/mnist-$*/results.json $@
$(OUT)/treevae_step.json:
	$(PYTHON) benchmarks/treevae_step.py --out $@
$(OUT)/treevae_step_one_thread.json:
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/treevae_step.py --leaves 2 10 32 --rounds 7 --out $@
$(OUT)/treevae_vectors.json:
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/treevae_vectors.py --seeds 0 1 2 --out $@

$(OUT)/memory.json:
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/memory.py --out $@
$(OUT)/trees_features.json:
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/trees.py --data $(filter %cifar.npz,$(FEATURES)) \
		--methods ward k-means mixture tree --out $@
$(RUNS)/contrastive/results.json:
	OMP_NUM_THREADS=1 $(PYTHON) examples/train_photographs.py --data $(CIFAR) --features contrastive --encoder-epochs 70 \
		--epochs 0 --out $(@D)
$(OUT)/cifar10-part-contrastive.json: $(RUNS)/contrastive/results.json
	cp $< $@
$(OUT)/trees_contrastive.json: $(RUNS)/contrastive/results.json
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/trees.py --data $(<D)/features.npz --seeds 0 --methods ward k-means mixture --out $@

STARTS := warm warm-1 random random-1 plain plain-1
$(RUNS)/digits-%/results.json:
	$(PYTHON) examples/train_treevae.py --holdout 300 --seed $(if $(findstring -1,$*),1,0) \
		$(if $(findstring random,$*),--random-start) $(if $(findstring plain,$*),--views 0) --out $(@D)
$(OUT)/digits_starts.json: $(STARTS:%=$(RUNS)/digits-%/results.json)
	$(AS_LIST) $^ > $@

SHAPES := --data mnist --cut-on upright
SHAPES_mnist-h := $(SHAPES) --holdout 10000
SHAPES_mnist-0 := $(SHAPES)
SHAPES_mnist-h1-growth := $(SHAPES) --holdout 10000 --keep-cuts growth --seed 1
SHAPES_mnist-h-always := $(SHAPES) --holdout 10000 --keep-cuts always --effort 0.5
SHAPES_fashion-h-growth := --data fashion-mnist --holdout 10000 --cut-on gradients --keep-cuts growth --cut-share 0.1 \
	--cut-neighbours 20
SHAPE_RUNS := mnist-h mnist-0 mnist-h1-growth mnist-h-always fashion-h-growth
$(RUNS)/shapes-%/results.json:
	OMP_NUM_THREADS=1 $(PYTHON) examples/train_treevae.py $(SHAPES_$*) --out $(@D)
$(OUT)/shapes.json: $(SHAPE_RUNS:%=$(RUNS)/shapes-%/results.json)
	$(AS_LIST) $^ > $@

COLOUR := --network residual --likelihood gaussian --latent 64 --width 32 --cut-on features --views 0 --effort 0.4
$(RUNS)/colour-%/results.json:
	$(PYTHON) examples/train_treevae.py --data $(CIFAR) $(COLOUR) --contrastive $* --out $(@D)
$(OUT)/cifar10-part.json: $(RUNS)/colour-100/results.json $(RUNS)/colour-0/results.json
	$(AS_LIST) $^ > $@

# --- images ---------------------------------------------------------------------------------------------------

$(RUNS)/fashion-classifier/classifier.safetensors:
	$(PYTHON) examples/train_classifier.py --data fashion-mnist --out $(@D)
$(RUNS)/fashion-classifier-holdout/classifier.safetensors:
	$(PYTHON) examples/train_classifier.py --data fashion-mnist --holdout 10000 --out $(@D)
$(RUNS)/mnist-classifier/classifier.safetensors:
	$(PYTHON) examples/train_classifier.py --data mnist --epochs 3 --out $(@D)
$(RUNS)/fashion-diffusion/model.safetensors:
	$(PYTHON) examples/train_diffusion.py --data fashion-mnist --tree examples/trees/fashion-mnist.safetensors \
		--blocks 1 --condition-noise 0.5 --epochs 20 --out $(@D)
$(RUNS)/mnist-diffusion/model.safetensors:
	$(PYTHON) examples/train_diffusion.py --data mnist --tree examples/trees/mnist.safetensors \
		--blocks 1 --epochs 6 --out $(@D)
$(OUT)/%_diffusion.json: $(RUNS)/%-diffusion/model.safetensors
	cp $(<D)/results.json $@
$(OUT)/fashion_generation.json: $(FASHION_PAIR) $(RUNS)/fashion-classifier/classifier.safetensors
	$(PYTHON) examples/evaluate_generation.py --data fashion-mnist --model $< --classifier $(lastword $^) \
		--grid karras --steps 14 --guidance 2.5 --efficientnet --out $@
$(OUT)/mnist_generation.json: $(RUNS)/mnist-diffusion/model.safetensors $(RUNS)/mnist-classifier/classifier.safetensors
	$(PYTHON) examples/evaluate_generation.py --data mnist --model $< --classifier $(lastword $^) \
		--grid karras --steps 14 --efficientnet --out $@
$(OUT)/sampler_steps.json: $(FASHION_PAIR) $(RUNS)/fashion-classifier/classifier.safetensors
	$(PYTHON) benchmarks/sampler_steps.py --data fashion-mnist --model $< --classifier $(lastword $^) --out $@

CONDITIONS := reconstruction diffuse_tree_vae diffuse_tree_vae-noise latent tree_diffusion reconstruction_path
$(RUNS)/conditions/%/model.safetensors:
	$(PYTHON) examples/train_diffusion.py --data fashion-mnist --tree examples/trees/fashion-mnist.safetensors \
		--holdout 10000 --epochs 2 --blocks 1 --condition $(*:-noise=) $(if $(findstring -noise,$*),--condition-noise 0.5) \
		--out $(@D)
$(RUNS)/conditions/%.json: $(RUNS)/conditions/%/model.safetensors $(RUNS)/fashion-classifier-holdout/classifier.safetensors
	$(PYTHON) examples/evaluate_generation.py --data fashion-mnist --holdout 10000 --samples 2000 --steps 14 --grid karras \
		--classifier $(lastword $^) --latents density --model $< --out $@
$(OUT)/fashion_conditions.json: $(CONDITIONS:%=$(RUNS)/conditions/%.json)
	$(AS_LIST) $^ > $@

$(OUT)/unet_step.json:
	$(PYTHON) benchmarks/unet_step.py --peers diffusers --out $@

# --- forgetting -----------------------------------------------------------------------------------------------

$(OUT)/forgetting_fashion.json:
	$(FORGETTING) --data fashion-mnist --key-width 256 --floor random-10% --set own_token_probability=1 --out $@
$(OUT)/forgetting_fashion_exact.json:
	$(FORGETTING) --data fashion-mnist --key-width 256 --permanent 0.5 --kinds random-10% --floor random-10% \
		--set aggregation=ensemble neighbours=4 --out $@
$(RUNS)/encoder-mnist/encoder.safetensors:
	$(PYTHON) examples/train_encoder.py --data mnist --rows 20000 --epochs 3 --hidden 16 --key-width 128 \
		--fitted-on "other data" --out $(@D)
$(OUT)/forgetting_fashion_encoder.json: $(RUNS)/encoder-mnist/encoder.safetensors
	$(FORGETTING) --data fashion-mnist --encoder $< --kinds random-10% --floor random-10% \
		--set own_token_probability=1 --out $@
$(OUT)/forgetting_cifar_own_1.json:
	$(FORGETTING) $(CIFAR_KEYS) --kinds random-10% --floor random-10% --set own_token_probability=1 \
		--also neighbours=1 neighbours=16 aggregation=softmax aggregation=rank --out $@
$(OUT)/forgetting_cifar_kinds.json:
	$(FORGETTING) $(CIFAR_KEYS) --kinds random-1% class cluster --set own_token_probability=1 --out $@
$(OUT)/forgetting_cifar_exact.json:
	$(FORGETTING) $(CIFAR_KEYS) --kinds random-10% --permanent 0.5 --floor random-10% \
		--set aggregation=ensemble neighbours=4 --out $@
$(OUT)/forgetting_cifar_own_half.json: SET := own_token_probability=0.5 stop_gradient=false
$(OUT)/forgetting_cifar_own_0.json: SET := own_token_probability=0 stop_gradient=false
$(OUT)/forgetting_cifar_softmax.json: SET := own_token_probability=0.5 aggregation=softmax stop_gradient=false
$(OUT)/forgetting_cifar_rank.json: SET := own_token_probability=0.5 aggregation=rank stop_gradient=false
$(OUT)/forgetting_cifar_no_dropout.json: SET := own_token_probability=1 drop_input=0 drop_exemplar=0
$(OUT)/forgetting_cifar_no_memory.json: SET := own_token_probability=1 drop_input=0 drop_exemplar=1
$(OUT)/forgetting_cifar_%.json:
	$(FORGETTING) $(CIFAR_KEYS) --kinds random-10% --set $(SET) --out $@
define MEDICAL
$(OUT)/forgetting_$(1).json: SET := own_token_probability=0.7
$(OUT)/forgetting_$(1)_own_1.json: SET := own_token_probability=1
$(OUT)/forgetting_$(1)_gradient.json: SET := own_token_probability=0.5 stop_gradient=false
$(patsubst %,$(OUT)/forgetting_$(1)%.json,_own_1 _gradient) $(OUT)/forgetting_$(1).json:
	$(FORGETTING) --data $($(2)) --encoder efficientnet --epochs 20 --kinds random-10% --floor random-10% \
		--also neighbours=16 --keys $(RUNS)/$(1)-keys.npz --set $$(SET) --out $$@
endef
$(eval $(call MEDICAL,ham,HAM))
$(eval $(call MEDICAL,pneumonia,PNEUMONIA))
$(OUT)/store.json:
	$(PYTHON) benchmarks/store.py --rounds 5 --out $@
$(OUT)/store_model.json:
	$(PYTHON) benchmarks/store.py --parts heads model --rounds 5 --out $@
$(OUT)/reliability.json:
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/reliability.py --out $@
$(OUT)/distributed.json:
	OMP_NUM_THREADS=1 $(PYTHON) -m torch.distributed.run --nproc-per-node 1 benchmarks/distributed.py --rounds 5 --out $@
	OMP_NUM_THREADS=1 $(PYTHON) -m torch.distributed.run --nproc-per-node 2 benchmarks/distributed.py --rounds 5 --out $@
	OMP_NUM_THREADS=1 $(PYTHON) -m torch.distributed.run --nproc-per-node 4 benchmarks/distributed.py --rounds 2 --store --out $@

# --- unlearning methods ---------------------------------------------------------------------------------------

$(OUT)/deletion_requests.json:
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/deletion_requests.py --out $@
$(OUT)/shadow_models.json:
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/shadow_models.py --models 64 --work $(RUNS)/shadows --out $@

CIFAR_TASK = --data $(CIFAR) --encoder efficientnet --epochs 20 --holdout 2000
PIXELS = --methods fine_tune neg_grad neg_grad_plus l1_sparse random_labels bad_teacher scrub sal_un ssd amun \
	"munkey mode=paper own_token_probability=1" "munkey readout=transformer aggregation=ensemble neighbours=4" rac_delete semi_parametric \
	nearest_neighbours sisa
$(OUT)/unlearning/fashion/table.md: TASK = --data fashion-mnist --epochs 10 --holdout 6000 --forget random:0.1 --seeds 3 $(PIXELS)
$(OUT)/unlearning/cifar/table.md: TASK = $(CIFAR_TASK) --forget random:0.1 --seeds 3 $(PIXELS)

# Other forget sets take over what was tuned, and leave out what trains longest.
OTHER_TASK = $(CIFAR_TASK) --seeds 1 --tuned $(OUT)/unlearning/cifar/tuned.json --methods fine_tune neg_grad \
	neg_grad_plus l1_sparse random_labels bad_teacher scrub sal_un ssd amun "munkey mode=paper own_token_probability=1" \
	"munkey readout=transformer aggregation=ensemble neighbours=4" nearest_neighbours
$(OUT)/unlearning/cifar-class/table.md: TASK = $(OTHER_TASK) --forget class
$(OUT)/unlearning/cifar-cluster/table.md: TASK = $(OTHER_TASK) --forget cluster:0.01
$(OUT)/unlearning/cifar-one-percent/table.md: TASK = $(OTHER_TASK) --forget random:0.01
$(OTHER_SETS:%=$(OUT)/unlearning/%/table.md): $(OUT)/unlearning/cifar/table.md

$(OUT)/unlearning/cifar-leakage/table.md: TASK = $(CIFAR_TASK) --forget random:0.1 --seeds 1 --methods \
	"munkey mode=paper own_token_probability=0 stop_gradient=false" \
	"munkey mode=paper own_token_probability=1 drop_exemplar=0.5" "munkey mode=paper own_token_probability=1 drop_input=0.5" \
	"munkey mode=paper own_token_probability=1 width=32 depth=1" "munkey mode=paper own_token_probability=1 noise=1" \
	"munkey mode=paper own_token_probability=0.5 stop_gradient=false" \
	"munkey mode=paper own_token_probability=1 drop_exemplar=0"

# On features; settings of paper mode where a training takes seconds.
AFTER := fine_tune neg_grad neg_grad_plus l1_sparse random_labels bad_teacher scrub sal_un ssd amun
PAPER := "munkey mode=paper" "munkey mode=paper own_token_probability=0.5 stop_gradient=false" \
	"munkey mode=paper own_token_probability=0.7" "munkey mode=paper own_token_probability=0.7 writer=true"
OWN_pneumonia := $(PAPER)
OWN_ham := $(PAPER)
OWN_flowers := $(PAPER)
OWN_adult := "munkey learn=trees" boosted_trees
SET = $(*:features-%=%)
$(OUT)/unlearning/features-%/table.md: TASK = --epochs 20 --holdout 500 --seeds 3 \
	--data $(subst {seed},0,$(filter %/$(SET).npz %/$(SET)-{seed}.npz,$(FEATURES))) \
	--methods $(AFTER) munkey nearest_neighbours logistic_regression rac_delete $(OWN_$(SET))
$(OUT)/unlearning/%/table.md:
	$(UNLEARNING) $(TASK) --out $(@D)

# --- readouts -------------------------------------------------------------------------------------------------

$(OUT)/readouts.json:
	$(PYTHON) benchmarks/readouts.py --data $(FEATURES) --tables adult --seeds 3 --out $@
$(RUNS)/flowers-%-160.npz:
	OMP_NUM_THREADS=1 $(PYTHON) examples/embed.py --data $(FLOWERS) --encoder $* --size 160 --out $@
SIZES := $(foreach network,efficientnet efficientnet-lite1,$(foreach seed,0 1 2,$(network)-160-$(seed)))
$(RUNS)/sizes/%/results.json: $(RUNS)/flowers-efficientnet-160.npz $(RUNS)/flowers-efficientnet-lite1-160.npz
	OMP_NUM_THREADS=1 $(PYTHON) examples/classify_features.py --seed $(lastword $(subst -, ,$*)) \
		--data $(RUNS)/flowers-$(*:-$(lastword $(subst -, ,$*))=).npz --out $(@D)
$(OUT)/flowers_sizes.json: $(SIZES:%=$(RUNS)/sizes/%/results.json)
	$(AS_LIST) $^ > $@
$(OUT)/new_classes.json:
	$(PYTHON) benchmarks/new_classes.py --data $(filter %flowers.npz %banking.npz,$(FEATURES)) --out $@
