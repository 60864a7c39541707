# avahi's hosts file, with NAME.local for clients that ask by multicast DNS on the bridge.
# jq -r -L . -f avahi.jq instances.json
include "addresses";
instances | .name as $name | (.lan + .wan)[] | "\(.) \($name).local"
