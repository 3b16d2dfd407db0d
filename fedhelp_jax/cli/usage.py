"""What ``fedhelp --help`` prints."""

COMMANDS = """\
usage: fedhelp COMMAND [--flag=value ...]

commands:
  train     train the clients of a federation, or go on where a stopped run was saved
            fedhelp train --config=configs/quickstart.py --workdir=runs/demo \\
                --config.algorithm.name=fedavg --config.seed=3
  teach     ask the foundation model about the public images, once; train reads the answers
            fedhelp teach --config=configs/fed_isic2019.py --dry-run
  evaluate  measure a trained run again, from its newest checkpoint; data may have been moved
            fedhelp evaluate --workdir=runs/demo --config.data.path=FOLDER
  show      print finished runs side by side
            fedhelp show runs/demo/fedhelp runs/demo/local
  compare   make the runs of a study that are missing, and one table of all: methods, data, seeds
            fedhelp compare --study=configs/studies/miniature.py --workdir=runs/miniature
  sweep     many runs that differ in a few settings and seeds, as one compiled program
            fedhelp sweep --config=configs/quickstart.py --workdir=runs/sweep \\
                --sweep=learning_rate=1e-4,1e-3 --sweep=algorithm.lambda_b=0,0.2 --seeds=0:4
  data      list, describe and prepare data sets, downloaded by hand or fetched
            fedhelp data prepare fed_isic2019 --manual_dir=DOWNLOAD
  list      what can be named in a config, with a line on each
            fedhelp list algorithms
  tune      only the study's trials, on validation images; compare makes them too
            fedhelp tune --study=configs/studies/baselines.py --workdir=runs/baselines

`fedhelp train --help` lists all settings.
"""

TRAIN = """\
usage: fedhelp train --config=FILE.py[:ARGUMENT] --workdir=FOLDER [--overwrite]
                     [--config.KEY=VALUE ...]
                     [--distributed [--coordinator_address=HOST:PORT --num_processes=N
                     --process_id=I] [--heartbeat_timeout=SECONDS]]

  --config     a Python file with get_config(), which returns the settings
  --workdir    the run folder; a run stopped there goes on, if its settings are the same
  --overwrite  remove what is in the run folder and begin anew

  --distributed          one of many processes, on one host or many, that share the run folder and
                         run the same command; each holds only its own clients' data on its devices
  --coordinator_address  HOST:PORT of process 0, which all can reach; this and the next two are left
                         out where JAX finds them itself: SLURM, Open MPI, GKE, TPU pods
  --num_processes        how many there are
  --process_id           which this one is, from 0
  --heartbeat_timeout    seconds without a sign of life after which a process counts as lost: 60

settings, with their defaults:
"""


TEACH = """\
usage: fedhelp teach --config=FILE.py[:ARGUMENT] [--dry-run] [--config.KEY=VALUE ...]
       fedhelp teach --study=FILE.py[:ARGUMENT] [--dry-run]

  --config   a Python file with get_config(), which returns the settings
  --study    a study file: all that its runs learn from, for all seeds
  --dry-run  only print what would be asked: images, requests, bytes, cost

settings, with their defaults:
"""


SWEEP = """\
usage: fedhelp sweep --config=FILE.py[:ARGUMENT] --workdir=FOLDER --sweep=KEY=VALUE,VALUE...
                     [--sweep=...] [--seeds=FIRST:END | --seeds=N,N...] [--split=test]
                     [--runs_at_once=N] [--config.KEY=VALUE ...]
                     [--distributed ...]

  --config        a Python file with get_config(), which returns the settings
  --workdir       the folder of the sweep; what is finished there is not run again
  --sweep         a setting and its values; given more than once, every combination is run
  --seeds         0:4 is 0, 1, 2, 3; the config's own seed if left out
  --split         what is measured: validation, to choose by, or test
  --runs_at_once  runs that a device vectorises; the back end's best if left out
  --distributed   one of many processes that share the folder; each makes its share of the runs.
                  The flags of fedhelp train --distributed go with it

settings, with their defaults:
"""


LIST = """\
usage: fedhelp list algorithms|models|data|public|teachers|metrics

prints what a config may name, and what each is. package.module:object names one of your own
(docs/extending.md); packages add theirs by entry points fedhelp_jax.algorithms and so on.
"""


DATA = """\
usage: fedhelp data list
       fedhelp data describe NAME[/CONFIG]
       fedhelp data prepare NAME[/CONFIG] [--manual_dir=FOLDER] [--data_dir=FOLDER]
                    [--allow_repacked] [--on_bad_example=refuse|skip]
       fedhelp data check --config=FILE.py[:ARGUMENT] [--workdir=FOLDER] [--config.KEY=VALUE ...]

check reads what a run would read, and prints clients, splits, classes, sizes and files that cannot
be used; with --workdir it draws a sheet of each client's images there. Nothing is trained.

NAME is one of the list, or of the catalogue of TensorFlow Datasets: fedhelp data describe cifar100

  --manual_dir      the folder of the download, as its publisher hands it out; archives in it need
                    not be unpacked. MedMNIST and the catalogue are fetched to
                    DATA_DIR/downloads if left out
  --data_dir        where prepared sets lie; $TFDS_DATA_DIR or ~/tensorflow_datasets if left out.
                    An interrupted preparation goes on from what it has made there
  --allow_repacked  take a file whose checksum is not the published one
  --on_bad_example  skip leaves out examples whose files are unusable, and lists them in
                    quarantine.csv in the folder of the prepared set; refuse, the default, ends
                    at the first
"""
