"""The public functions of the trainers, and their options and results."""

from deltamux_trainers.options import EvaluateOptions as EvaluateOptions
from deltamux_trainers.options import TrainOptions as TrainOptions
from deltamux_trainers.options import read_config as read_config
from deltamux_trainers.tools.check_data import DataReport as DataReport
from deltamux_trainers.tools.check_data import check_data as check_data
from deltamux_trainers.tools.compose import ComposeResult as ComposeResult
from deltamux_trainers.tools.compose import compose_directories as compose_directories
from deltamux_trainers.tools.compress import CompressResult as CompressResult
from deltamux_trainers.tools.compress import compress as compress
from deltamux_trainers.tools.convert import convert as convert
from deltamux_trainers.tools.evaluate import EvalResult as EvalResult
from deltamux_trainers.tools.evaluate import evaluate as evaluate
from deltamux_trainers.tools.merge import MergeResult as MergeResult
from deltamux_trainers.tools.merge import merge as merge
from deltamux_trainers.training.train import TrainResult as TrainResult
from deltamux_trainers.training.train import train as train
