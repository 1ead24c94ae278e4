#!/usr/bin/env bash
# MAML, 4-CONV, Omniglot 5-way 1-shot: Finn et al., ICML 2017, arXiv 1703.03400.
# Published accuracy: 98.7 ± 0.4 % (MAML paper); 99.1 % (README of learn2learn, its own MAML).
# MAML++'s setting for Omniglot as remembered, not verified: 64 filters, meta-batch 8, as many queries as shots,
#   150 epochs. The inner rate and the constant outer rate are those of this method's other rows.
# Time and memory: not measured on GPU.
#   python preprocess/preprocess.py --datasets omniglot
#   bash experiment_scripts/omniglot_5way_1shot/maml_4conv.sh 0
#   TEST=1 bash experiment_scripts/omniglot_5way_1shot/maml_4conv.sh 0
#   TEST=1 TEST_DATASET=glyphs bash experiment_scripts/omniglot_5way_1shot/maml_4conv.sh 0
source "$(dirname "${BASH_SOURCE[0]}")/../run.sh"
row=(
  --dataset_name omniglot --image_height 28 --image_width 28 --image_channels 1 --normalization unit
  --num_classes_per_set 5 --num_samples_per_class 1 --num_target_samples 1 --batch_size 8 --rotate_classes true
  --backbone 4-CONV --cnn_num_filters 64 --num_stages 4 --max_pooling true
  --batch_norm transductive --per_step_bn_statistics false --use_bias false
  --inner_loop_part all --number_of_training_steps_per_iter 5 --number_of_evaluation_steps_per_iter 5
  --init_inner_loop_learning_rate 0.01 --learnable_per_layer_per_step_inner_loop_learning_rate false
  --contextual_grad false
  --second_order true --first_order_to_second_order_epoch -1 --total_epochs 150 --total_iter_per_epoch 500
  --use_multi_step_loss_optimization false
  --meta_learning_rate 0.001 --min_learning_rate 0.001
  --num_evaluation_tasks 600 --top_n_models 5 --seed 104 --train_seed 0 --val_seed 0
)
run_row "$@"
