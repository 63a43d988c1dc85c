"""No test waits for a hub: one that is asked in vain is asked again, for minutes in a bad network.

The libraries read the variables when they are imported, so this module comes before all of them.
"""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
