"""The columns and classes of NSL-KDD, and of KDD Cup 1999 whose features it has.

Tavallaee, Bagheri, Lu and Ghorbani (2009), "A Detailed Analysis of the KDD CUP 99 Data Set". Which
family an attack is of follows that paper's Table 1 and, for attacks of the test data alone, the
lists of KDD Cup 1999; sources differ about `worm` and `httptunnel`.
"""

from .schema import RecordSchema

CATEGORICAL = ("protocol_type", "service", "flag")
FEATURES = tuple(
    "duration protocol_type service flag src_bytes dst_bytes land wrong_fragment urgent hot "
    "num_failed_logins logged_in num_compromised root_shell su_attempted num_root "
    "num_file_creations num_shells num_access_files num_outbound_cmds is_host_login "
    "is_guest_login count srv_count serror_rate srv_serror_rate rerror_rate srv_rerror_rate "
    "same_srv_rate diff_srv_rate srv_diff_host_rate dst_host_count dst_host_srv_count "
    "dst_host_same_srv_rate dst_host_diff_srv_rate dst_host_same_src_port_rate "
    "dst_host_srv_diff_host_rate dst_host_serror_rate dst_host_srv_serror_rate "
    "dst_host_rerror_rate dst_host_srv_rerror_rate".split()
)
ATTACKS = {
    "dos": "back land neptune pod smurf teardrop apache2 mailbomb processtable udpstorm worm",
    "probe": "ipsweep nmap portsweep satan mscan saint",
    "r2l": "ftp_write guess_passwd imap multihop phf spy warezclient warezmaster httptunnel named "
    "sendmail snmpgetattack snmpguess xlock xsnoop",
    "u2r": "buffer_overflow loadmodule perl rootkit ps sqlattack xterm",
}


def nsl_kdd_schema(classes: str = "two") -> RecordSchema:
    """The schema of `KDDTrain+` and `KDDTest+`: 41 features, the attack's name, its difficulty.

    Args:
        classes: `"two"`: normal and attack; `"five"`: normal and the four families of attacks.

    Raises:
        ValueError: `classes` is neither.
    """
    if classes not in ("two", "five"):
        raise ValueError(f"`classes` must be 'two' or 'five', got {classes!r}.")
    named = {"normal": "normal"}
    for family, names in ATTACKS.items():
        named |= dict.fromkeys(names.split(), "attack" if classes == "two" else family)
    kinds = {n: "categorical" if n in CATEGORICAL else "continuous" for n in FEATURES}
    return RecordSchema(
        columns={**kinds, "attack": "label", "difficulty": "ignored"}, classes=named
    )
