#!/usr/bin/env bash
# Any method on any data set, where the two have no script of their own:
#   bash experiment_scripts/any.sh METHOD DATASET SHOT GPU_ID [--option value …]
#   bash experiment_scripts/any.sh ALFA CUB 1 0
#   bash experiment_scripts/any.sh ProtoNet_conv64 my_images 1,5 0 --num_samples_per_class 10
#   TEST=1 TEST_DATASET=CUB bash experiment_scripts/any.sh MAML++ CIFAR-FS 5 0
# METHOD is one of those listed below. A network may follow it: _4conv (the default) or _resnet12; with a head _resnet12
# (the default), _conv64 or _r2d2net (the default of R2D2). DATASET is a data set of these scripts, or a folder of your
# own in datasets/. Case, '-' and '_' do not matter. SHOT is the shot; with a head, which one training serves for all
# shots, it is the shots to test with, such as 1,5.
# Where METHOD has a script for DATASET, its options hold. Otherwise they are those of MAML's script for DATASET, or of
# MetaOptNet's with a head, and what METHOD adds below. A folder of your own has the options of CUB: 84×84 pixels.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"

fold() { tr -d ' _-' <<<"${1,,}"; }

methods="CxGrad, MAML, MAML++, ALFA, ALFA_L2F, ALFA_random_init, L2F, ANIL, BOIL, MetaSGD, MetaOptNet_SVM, \
MetaOptNet_RR, ProtoNet, R2D2"
(($# >= 3)) || fail "usage: bash experiment_scripts/any.sh METHOD DATASET SHOT GPU_ID [--option value …]" \
  "METHOD is one of $methods."
words_before_gpu=" $1 $2 $3"

method=$(fold "$1")
for network in 4conv resnet12 conv64 r2d2net ""; do
  [[ $method != *"$network" ]] || break
done
method=${method%"$network"}
data=CUB own=(--dataset_name "$2")
wanted=$(fold "$2") && wanted=${wanted%dataset} && wanted=${wanted%fullsize} # as in omniglot_dataset, MAML++'s name
for folder in experiment_scripts/*_5way; do
  known=$(basename "$folder" _5way)
  [[ $wanted != "$(fold "$known")" ]] || data=$known own=()
done

base=maml_4conv
case $method in
  maml) name=maml adds=() ;;
  cxgrad) name=CxGrad adds=(--contextual_grad true --num_context_params 100 --context_params_learning_rate 1) ;;
  alfa) name=ALFA adds=(--alfa true --init_inner_loop_weight_decay 0.0005 --use_bias true) ;;
  alfal2f) name=ALFA_L2F adds=(--alfa true --init_inner_loop_weight_decay 0.0005 --attenuate true --use_bias true) ;;
  alfarandominit)
    name=ALFA_random_init
    adds=(--alfa true --init_inner_loop_weight_decay 0.0005 --random_init true --use_bias true)
    ;;
  l2f) name=L2F adds=(--attenuate true --use_bias true) ;;
  anil) name=ANIL adds=(--inner_loop_part head) ;;
  boil) name=BOIL adds=(--inner_loop_part body) ;;
  metasgd) name=MetaSGD adds=(--meta_sgd true) ;;
  maml++ | mamlpp)
    name=MAMLpp
    adds=(--learnable_per_layer_per_step_inner_loop_learning_rate true --init_inner_loop_learning_rate 0.1)
    adds+=(--use_multi_step_loss_optimization true --multi_step_loss_num_epochs 15 --per_step_bn_statistics true)
    adds+=(--lr_schedule per_epoch --min_learning_rate 0.00001 --use_bias true)
    [[ $data != *imagenet ]] || adds+=(--clamp_outer_gradients 10)
    [[ $data != glyphs ]] || adds+=(--multi_step_loss_num_epochs 2 --min_learning_rate 0.00003)
    ;;
  metaoptnetsvm) name=MetaOptNet_SVM base=$name adds=() ;;
  metaoptnetrr) name=MetaOptNet_RR base=$name adds=() ;;
  protonet) name=ProtoNet base=MetaOptNet_RR adds=(--head ProtoNet) ;;
  r2d2) name=R2D2 base=MetaOptNet_RR adds=(--head R2D2) network=${network:-r2d2net} ;;
  *) fail "There is no method '$1'; METHOD is one of $methods." ;;
esac

case $base,$network in
  maml_4conv,4conv | maml_4conv,) network=4conv ;;
  maml_4conv,resnet12)
    adds+=(--backbone ResNet-12 --resnet_widths 64-128-256-512 --tasks_per_pass 1 --checkpoint_inner_steps true)
    ;;
  MetaOptNet*,conv64) base+=_conv64 ;;
  MetaOptNet*,resnet12 | MetaOptNet*,) network=resnet12 base+=_resnet12 ;;
  MetaOptNet*,r2d2net) base+=_conv64 adds+=(--backbone R2D2Net) ;;
  *) fail "$name does not work with $network: gradient steps go with 4conv or resnet12, heads with resnet12, conv64 or r2d2net." ;;
esac

folder=experiment_scripts/${data}_5way
if [[ $base == maml* ]]; then
  [[ $3 == 1 ]] && folder+=_1shot || folder+=_5shot
  own+=(--num_samples_per_class "$3")
else
  own+=(--test_shots "$3")
fi
script=$folder/${name}_$network.sh
[[ -f $script ]] && adds=() || script=$folder/$base.sh
source "$script" "${4-}" --experiment_name "${name}_$network" ${adds[@]+"${adds[@]}"} "${own[@]}" "${@:5}"
