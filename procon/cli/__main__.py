"""``python -m procon.cli``"""

import sys

from procon.cli.parsing import main

sys.exit(main())
