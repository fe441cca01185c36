"""What `import loraloom` offers. `__init__.py` reads this file, and loads each name when it is first used."""

# adapters and their algebra
from .adapters.heads import (
    Head as Head,
    align_head as align_head,
    align_heads as align_heads,
    heads_by_task as heads_by_task,
)
from .adapters.hub import adapter_folder as adapter_folder
from .adapters.lowrank import (
    concatenate as concatenate,
    norm as norm,
    svd_factors as svd_factors,
    truncate as truncate,
    truncate_dense as truncate_dense,
)
from .adapters.peft import (
    adapter_writer as adapter_writer,
    read_adapter as read_adapter,
    read_provenance as read_provenance,
    write_adapter as write_adapter,
)
from .adapters.update import Adapter as Adapter, Update as Update

# what adapters and statistics foretell, and how near merged models are to the single ones
from .analysis.agreement import (
    Candidates as Candidates,
    agreement as agreement,
    candidates_of as candidates_of,
)
from .analysis.detectors import Sighting as Sighting, detector as detector
from .analysis.inspection import inspect_paths as inspect_paths
from .analysis.interference import (
    interference as interference,
    products as products,
    ratio as ratio,
    response as response,
)
from .analysis.outlook import outlook as outlook
from .analysis.overlap import overlaps as overlaps
from .analysis.prediction import predict as predict
from .analysis.screening import Screening as Screening, screen as screen
from .analysis.screening_declared import KnownStart as KnownStart
from .analysis.screening_measures import Seen as Seen
from .analysis.screening_texts import ScreenTexts as ScreenTexts
from .analysis.searchlight import Reader as Reader
from .analysis.single import SingleModels as SingleModels

# what everybody needs
from .errors import LoraloomError as LoraloomError
from .files.hashing import task_seed as task_seed

# merging
from .merging import (
    Merged as Merged,
    MergeOptions as MergeOptions,
    Plan as Plan,
    Rule as Rule,
    get_rule as get_rule,
    make_plan as make_plan,
    merge as merge,
    read_readout as read_readout,
    rule as rule,
    rule_names as rule_names,
    write_merged as write_merged,
)
from .merging.choice import AgreementFacts as AgreementFacts, CandidateFacts as CandidateFacts
from .merging.facts import FusionFacts as FusionFacts, MergedFacts as MergedFacts, MergeFacts as MergeFacts
from .merging.folders import fuse_folders as fuse_folders, merge_folders as merge_folders, plan_folders as plan_folders
from .merging.fuse import fuse as fuse
from .merging.placement import Changes as Changes
from .merging.registry import Probe as Probe
from .merging.rules.regression import reading_groups as reading_groups, rows_read as rows_read
from .merging.serving import ExportFacts as ExportFacts, export_folder as export_folder
from .model.generator import Answered as Answered, Generator as Generator, answer_task as answer_task

# the base model
from .model.layers import LayerReader as LayerReader, base_running as base_running, target_layers as target_layers
from .model.load import (
    base_folder as base_folder,
    load_classifier as load_classifier,
    load_generator as load_generator,
)
from .model.packaged import demo_base as demo_base, smollm2_base as smollm2_base
from .model.probe import TaskProbe as TaskProbe
from .model.runner import Evaluator as Evaluator, evaluate as evaluate, labels as labels, scored as scored
from .model.tokens import (
    Encoded as Encoded,
    Side as Side,
    batch_sides as batch_sides,
    batches as batches,
    encode as encode,
)
from .progress import Reporter as Reporter

# results and their report
from .report import markdown_tables as markdown_tables, verdict as verdict, write_report as write_report
from .results import Score as Score, StudyResult as StudyResult, average as average
from .settings import (
    AlignmentSettings as AlignmentSettings,
    Kind as Kind,
    LoraSettings as LoraSettings,
    StatisticsSettings as StatisticsSettings,
    TrainingSettings as TrainingSettings,
)

# where A starts
from .starts.files import (
    initialise_all_from_files as initialise_all_from_files,
    initialise_from_files as initialise_from_files,
)
from .starts.initialise import initialise as initialise, initialise_all as initialise_all
from .starts.keep import KeepInSubspace as KeepInSubspace, keep_callback as keep_callback
from .starts.options import StartOptions as StartOptions
from .starts.spectra import share_seen as share_seen, spectrum as spectrum, top_directions as top_directions
from .starts.subspace import (
    Subspace as Subspace,
    loud_directions as loud_directions,
    osrm_subspace as osrm_subspace,
    osrm_subspaces as osrm_subspaces,
    project_out as project_out,
    response_scale as response_scale,
)

# what layers see
from .statistics.collect import RowSum as RowSum, collect_statistics as collect_statistics
from .statistics.file import Layer as Layer, Statistics as Statistics
from .statistics.moments import Moment as Moment, pooled as pooled
from .statistics.privacy import (
    ONE_ROW as ONE_ROW,
    Noise as Noise,
    add_noise as add_noise,
    clipped as clipped,
    noise_scale as noise_scale,
)
from .statistics.texts import (
    collect as collect,
    collect_from_file as collect_from_file,
    generic_rows as generic_rows,
    make_atlas as make_atlas,
)

# studies, tasks and training
from .study.compare import (
    by_task as by_task,
    compare as compare,
    compare_unlabelled as compare_unlabelled,
)
from .study.demo import demo_recipe as demo_recipe
from .study.export import run_study as run_study
from .study.plan import Planned as Planned, plan_study as plan_study
from .study.recipe import Recipe as Recipe, slug as slug
from .study.runners import Where as Where
from .study.stages import merged_adapters as merged_adapters
from .study.tasks import build_task as build_task
from .tasks.builtin import builtin_task as builtin_task
from .tasks.builtin_text import STANDARD_LIBRARY as STANDARD_LIBRARY, docstrings_of as docstrings_of, parts as parts
from .tasks.files import file_task as file_task
from .tasks.glue import GLUE as GLUE, glue_task as glue_task
from .tasks.metrics import metric_value as metric_value
from .tasks.prompts import prompt_task as prompt_task
from .tasks.sources import read_table as read_table
from .tasks.task import Task as Task
from .training.adapter import lora_config as lora_config, train_adapter as train_adapter
from .training.distil import ByTeachers as ByTeachers, distil as distil

__version__: str
