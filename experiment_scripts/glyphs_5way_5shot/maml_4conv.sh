#!/usr/bin/env bash
# MAML, 4-CONV, glyphs 5-way 5-shot: Finn et al., ICML 2017, arXiv 1703.03400.
# Published accuracy: none known.
# Time and memory: not measured yet on CPU; not measured on GPU.
#   python preprocess/preprocess.py --datasets glyphs digits
#   bash experiment_scripts/glyphs_5way_5shot/maml_4conv.sh 0
#   TEST=1 bash experiment_scripts/glyphs_5way_5shot/maml_4conv.sh 0
#   TEST=1 TEST_DATASET=digits bash experiment_scripts/glyphs_5way_5shot/maml_4conv.sh 0
source "$(dirname "${BASH_SOURCE[0]}")/../run.sh"
row=(
  --dataset_name glyphs --image_height 32 --image_width 32 --image_channels 3 --normalization channel
  --num_classes_per_set 5 --num_samples_per_class 5 --num_target_samples 5 --batch_size 4
  --backbone 4-CONV --cnn_num_filters 32 --num_stages 4 --max_pooling true
  --batch_norm transductive --per_step_bn_statistics false --use_bias false
  --inner_loop_part all --number_of_training_steps_per_iter 3 --number_of_evaluation_steps_per_iter 3
  --init_inner_loop_learning_rate 0.01 --learnable_per_layer_per_step_inner_loop_learning_rate false
  --contextual_grad false
  --second_order true --first_order_to_second_order_epoch -1 --total_epochs 10 --total_iter_per_epoch 60
  --use_multi_step_loss_optimization false
  --meta_learning_rate 0.003 --min_learning_rate 0.003
  --num_evaluation_tasks 200 --top_n_models 5 --seed 104 --train_seed 0 --val_seed 0
)
run_row "$@"
