export MASKTUNE_DATA=/work/shared/mnist OMP_NUM_THREADS=1; cd /work/main
stem=$1; shift
/tmp/venv/bin/papermill notebooks/$stem.ipynb /tmp/nb/$stem.out.ipynb --cwd notebooks --no-progress-bar -p dataset mnist5k -p limit 400 -p epochs 2 -p directory /tmp/t7 "$@" 2>&1 | tail -25
