// Catalens on Azure Container Apps: ingest, embedder and query, scaled to zero, beside Event Hubs (its Kafka endpoint), a
// storage account, a Key Vault and a Redis. docs/how-to/azure.md says what to do, and what was not tried.
//
// What the embedder scales on equals k8s/components/keda/scaledobject.yaml; a test compares them.

@description('Begins every name.')
@minLength(3)
@maxLength(12)
param name string = 'catalens'

param location string = resourceGroup().location

@description('Name of an Azure Container Registry in this resource group that has the images.')
param registry string

@description('Of the images catalens-ingest, catalens-embedder, catalens-query and catalens-standalone.')
param release string = '0.1.0'

@description('Where a Qdrant answers, such as https://….azure.cloud.qdrant.io. Empty: one in a container, without storage: it begins anew wherever it is moved to.')
param qdrantUrl string = ''

@secure()
@description('The API key of that Qdrant.')
param qdrantApiKey string = ''

@secure()
@description('Keys that ingest and query accept: the content of the file that `catalens keys create` writes.')
param apiKeys string

@description('Of each topic: the most workers that can share the work. Standard namespaces have at most 32.')
@minValue(1)
@maxValue(32)
param partitions int = 12

@description('Replicas of the query service that never sleep. 0 saves money; the first search after a pause waits for the model.')
@minValue(0)
param queryReplicas int = 1

@description('What the job `catalens` does when it is started: the words behind `catalens`.')
param command array = ['reindex', '--list']

var unique = uniqueString(resourceGroup().id)
var port = 8080
var group = 'catalens-embedder'

// --- the log: each event hub is a topic; what is compacted keeps each product's newest record for ever, anything else
// goes after 168 hours at the latest: the Standard tier keeps nothing longer.

var topics = [
  { name: 'catalog.products', policy: 'Compact', hours: 168 }
  { name: 'catalog.offers', policy: 'Compact', hours: 168 }
  { name: 'catalog.retry.10s', policy: 'Delete', hours: 168 }
  { name: 'catalog.retry.1m', policy: 'Delete', hours: 168 }
  { name: 'catalog.retry.10m', policy: 'Delete', hours: 168 }
  { name: 'catalog.dlq', policy: 'Delete', hours: 168 }
  { name: 'catalog.outcomes', policy: 'Delete', hours: 1 }
]

resource events 'Microsoft.EventHub/namespaces@2024-01-01' = {
  name: '${name}-${unique}'
  location: location
  sku: { name: 'Standard', tier: 'Standard', capacity: 1 }
  properties: { minimumTlsVersion: '1.2' }
}

@batchSize(1)
resource hubs 'Microsoft.EventHub/namespaces/eventhubs@2024-01-01' = [
  for topic in topics: {
    parent: events
    name: topic.name
    properties: {
      partitionCount: topic.name == 'catalog.outcomes' ? 1 : partitions
      retentionDescription: topic.policy == 'Compact' ? { cleanupPolicy: 'Compact', tombstoneRetentionTimeInHours: topic.hours } : { cleanupPolicy: 'Delete', retentionTimeInHours: topic.hours }
    }
  }
]

resource access 'Microsoft.EventHub/namespaces/authorizationRules@2024-01-01' = {
  parent: events
  name: 'catalens'
  properties: { rights: ['Listen', 'Send'] }
}

// --- pictures and models

resource storage 'Microsoft.Storage/storageAccounts@2023-05-01' = {
  name: take('${replace(name, '-', '')}${unique}', 24)
  location: location
  kind: 'StorageV2'
  sku: { name: 'Standard_LRS' }
  properties: { minimumTlsVersion: 'TLS1_2', allowBlobPublicAccess: false }

  resource blobs 'blobServices' = {
    name: 'default'
    resource pictures 'containers' = { name: 'pictures' }
  }

  resource files 'fileServices' = {
    name: 'default'
    resource models 'shares' = { name: 'models', properties: { shareQuota: 16 } }
  }
}

// --- who they are, and what they may

resource identity 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' = {
  name: name
  location: location
}

resource images 'Microsoft.ContainerRegistry/registries@2023-07-01' existing = { name: registry }

resource vault 'Microsoft.KeyVault/vaults@2023-07-01' = {
  name: take('${name}-${unique}', 24)
  location: location
  properties: {
    tenantId: tenant().tenantId
    sku: { family: 'A', name: 'standard' }
    enableRbacAuthorization: true
  }

  resource kafka 'secrets' = {
    name: 'kafka-connection'
    properties: { value: access.listKeys().primaryConnectionString }
  }

  resource keys 'secrets' = {
    name: 'api-keys'
    properties: { value: apiKeys }
  }

  resource qdrant 'secrets' = {
    name: 'qdrant-api-key'
    properties: { value: empty(qdrantApiKey) ? 'none' : qdrantApiKey }
  }
}

var roles = {
  pull: '7f951dda-4ed3-4680-a7ca-43fe172d538d' // AcrPull
  secrets: '4633458b-17de-408a-b874-0445c86b69e6' // Key Vault Secrets User
  pictures: 'ba92f5b4-2d11-453d-a403-e96b0029c9fe' // Storage Blob Data Contributor
}

resource mayPull 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: images
  name: guid(images.id, identity.id, roles.pull)
  properties: {
    principalId: identity.properties.principalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.pull)
  }
}

resource mayReadSecrets 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: vault
  name: guid(vault.id, identity.id, roles.secrets)
  properties: {
    principalId: identity.properties.principalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.secrets)
  }
}

resource mayKeepPictures 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  scope: storage
  name: guid(storage.id, identity.id, roles.pictures)
  properties: {
    principalId: identity.properties.principalId
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId('Microsoft.Authorization/roleDefinitions', roles.pictures)
  }
}

// --- where they run

resource logs 'Microsoft.OperationalInsights/workspaces@2023-09-01' = {
  name: name
  location: location
  properties: { sku: { name: 'PerGB2018' }, retentionInDays: 30 }
}

resource environment 'Microsoft.App/managedEnvironments@2025-01-01' = {
  name: name
  location: location
  properties: {
    appLogsConfiguration: {
      destination: 'log-analytics'
      logAnalyticsConfiguration: {
        customerId: logs.properties.customerId
        sharedKey: logs.listKeys().primarySharedKey
      }
    }
    workloadProfiles: [{ name: 'Consumption', workloadProfileType: 'Consumption' }]
  }

  resource models 'storages' = {
    name: 'models'
    properties: {
      azureFile: {
        accountName: storage.name
        accountKey: storage.listKeys().keys[0].value
        shareName: 'models'
        accessMode: 'ReadOnly'
      }
    }
  }
}

// --- the engines that have no service of Azure's behind them

resource redis 'Microsoft.App/containerApps@2025-01-01' = {
  name: 'redis'
  location: location
  properties: {
    environmentId: environment.id
    workloadProfileName: 'Consumption'
    configuration: {
      ingress: { external: false, transport: 'tcp', targetPort: 6379, exposedPort: 6379 }
    }
    template: {
      containers: [
        {
          name: 'redis'
          image: 'docker.io/library/redis:8.8.3-alpine'
          // Nothing is kept: the cache may be empty at any time, Idempotency-Keys are remembered as long as it runs.
          args: ['--maxmemory', '256mb', '--maxmemory-policy', 'allkeys-lru', '--save', '', '--appendonly', 'no']
          resources: { cpu: json('0.25'), memory: '0.5Gi' }
        }
      ]
      scale: { minReplicas: 1, maxReplicas: 1 }
    }
  }
}

resource qdrant 'Microsoft.App/containerApps@2025-01-01' = if (empty(qdrantUrl)) {
  name: 'qdrant'
  location: location
  properties: {
    environmentId: environment.id
    workloadProfileName: 'Consumption'
    configuration: {
      ingress: {
        external: false
        transport: 'tcp'
        targetPort: 6333
        exposedPort: 6333
        additionalPortMappings: [{ external: false, targetPort: 6334, exposedPort: 6334 }]
      }
    }
    template: {
      containers: [
        {
          name: 'qdrant'
          image: 'docker.io/qdrant/qdrant:v1.19.1-unprivileged'
          env: [{ name: 'QDRANT__TELEMETRY_DISABLED', value: 'true' }]
          resources: { cpu: json('1.0'), memory: '2Gi' }
          volumeMounts: [{ volumeName: 'storage', mountPath: '/qdrant/storage' }]
        }
      ]
      // Not Azure Files: Qdrant asks for a file system of its own on a block device.
      volumes: [{ name: 'storage', storageType: 'EmptyDir' }]
      scale: { minReplicas: 1, maxReplicas: 1 }
    }
  }
}

// --- the services

var shared = [
  { name: 'CATALENS_HTTP__HOST', value: '0.0.0.0' }
  { name: 'CATALENS_HTTP__PORT', value: string(port) }
  { name: 'CATALENS_LOG_FORMAT', value: 'json' }
  { name: 'CATALENS_DATA_DIR', value: '/data' }
  { name: 'CATALENS_KAFKA__BOOTSTRAP_SERVERS', value: '${events.name}.servicebus.windows.net:9093' }
  { name: 'CATALENS_KAFKA__SECURITY_PROTOCOL', value: 'SASL_SSL' }
  { name: 'CATALENS_KAFKA__SASL_MECHANISM', value: 'PLAIN' }
  { name: 'CATALENS_KAFKA__USERNAME', value: '$ConnectionString' }
  { name: 'CATALENS_KAFKA__PASSWORD', secretRef: 'kafka-connection' }
  { name: 'CATALENS_KAFKA__COMPRESSION', value: 'none' } // the Standard tier takes no compressed batches
  { name: 'CATALENS_KAFKA__MAX_MESSAGE', value: '980000' } // with the headers of a retry below what a request may have
  { name: 'CATALENS_KAFKA__MAX_REQUEST', value: '1000000' } // Event Hubs closes connections that send more than 1,046,528
  { name: 'CATALENS_KAFKA__REQUEST_TIMEOUT', value: '30' } // Event Hubs asks for more than 20
  { name: 'CATALENS_KAFKA__PARTITIONS', value: string(partitions) }
  { name: 'CATALENS_LOG__DEAD_LETTER_DAYS', value: '7' } // as long as the hub catalog.dlq keeps them
  { name: 'CATALENS_QDRANT__URL', value: empty(qdrantUrl) ? 'http://qdrant:6333' : qdrantUrl }
  { name: 'CATALENS_QDRANT__API_KEY', secretRef: 'qdrant-api-key' }
  { name: 'CATALENS_REDIS__URL', value: 'redis://redis:6379/0' }
  { name: 'CATALENS_BLOBS__URL', value: 'az://pictures' }
  { name: 'AZURE_STORAGE_ACCOUNT_NAME', value: storage.name }
  { name: 'AZURE_CLIENT_ID', value: identity.properties.clientId }
]
var secrets = [
  { name: 'kafka-connection', keyVaultUrl: vault::kafka.properties.secretUri, identity: identity.id }
  { name: 'kafka-user', value: '$ConnectionString' } // for all to know, but KEDA takes a user's name from a secret only
  { name: 'qdrant-api-key', keyVaultUrl: vault::qdrant.properties.secretUri, identity: identity.id }
  { name: 'api-keys', keyVaultUrl: vault::keys.properties.secretUri, identity: identity.id }
]
var identities = { type: 'UserAssigned', userAssignedIdentities: { '${identity.id}': {} } }
var pulled = [{ server: images.properties.loginServer, identity: identity.id }]
var mounts = [
  { volumeName: 'data', mountPath: '/data' }
  { volumeName: 'models', mountPath: '/data/models' }
]
var volumes = [
  { name: 'data', storageType: 'EmptyDir' } // caches; nothing that must survive
  { name: 'models', storageType: 'AzureFile', storageName: environment::models.name }
]
// Asked of callers: hashes, in a file. A folder is mounted, and read again when it changes.
var keysFile = { name: 'CATALENS_API_KEYS_FILE', value: '/etc/catalens/keys.jsonl' }
var keysMount = { volumeName: 'keys', mountPath: '/etc/catalens' }
var keysVolume = { name: 'keys', storageType: 'Secret', secrets: [{ secretRef: 'api-keys', path: 'keys.jsonl' }] }
var probes = [
  // No failureThreshold above 10 is taken. Asked once it is usually there, then seldom: a large model has two minutes.
  { type: 'Startup', httpGet: { path: '/livez', port: port }, initialDelaySeconds: 4, periodSeconds: 12, failureThreshold: 10, timeoutSeconds: 2 }
  { type: 'Liveness', httpGet: { path: '/livez', port: port }, periodSeconds: 10, failureThreshold: 6, timeoutSeconds: 5 }
  { type: 'Readiness', httpGet: { path: '/readyz', port: port }, periodSeconds: 5, failureThreshold: 3, timeoutSeconds: 4 }
]
var http = [{ name: 'http', http: { metadata: { concurrentRequests: '20' } } }]

resource ingest 'Microsoft.App/containerApps@2025-01-01' = {
  name: 'ingest'
  location: location
  identity: identities
  dependsOn: [hubs, mayPull, mayReadSecrets, mayKeepPictures]
  properties: {
    environmentId: environment.id
    workloadProfileName: 'Consumption'
    configuration: {
      ingress: { external: true, targetPort: port, transport: 'auto' }
      registries: pulled
      secrets: secrets
    }
    template: {
      terminationGracePeriodSeconds: 60
      containers: [
        {
          name: 'ingest'
          image: '${images.properties.loginServer}/catalens-ingest:${release}'
          env: concat(shared, [keysFile])
          resources: { cpu: json('0.5'), memory: '1Gi' }
          probes: probes
          volumeMounts: concat(mounts, [keysMount])
        }
      ]
      volumes: concat(volumes, [keysVolume])
      scale: { minReplicas: 0, maxReplicas: 10, rules: http }
    }
  }
}

resource query 'Microsoft.App/containerApps@2025-01-01' = {
  name: 'query'
  location: location
  identity: identities
  dependsOn: [hubs, mayPull, mayReadSecrets, mayKeepPictures]
  properties: {
    environmentId: environment.id
    workloadProfileName: 'Consumption'
    configuration: {
      ingress: { external: true, targetPort: port, transport: 'auto' }
      registries: pulled
      secrets: secrets
    }
    template: {
      terminationGracePeriodSeconds: 60
      containers: [
        {
          name: 'query'
          image: '${images.properties.loginServer}/catalens-query:${release}'
          env: concat(shared, [
            keysFile
            { name: 'CATALENS_ENCODER__LANES', value: '2' }
          ])
          resources: { cpu: json('2.0'), memory: '4Gi' }
          probes: probes
          volumeMounts: concat(mounts, [keysMount])
        }
      ]
      volumes: concat(volumes, [keysVolume])
      scale: { minReplicas: queryReplicas, maxReplicas: 10, rules: http }
    }
  }
}

// One rule a topic, as each is a trigger of KEDA's: the highest of their wishes counts.
var consumed = [
  { name: 'products', topic: 'catalog.products', lag: '2000' }
  { name: 'offers', topic: 'catalog.offers', lag: '20000' }
  { name: 'retry-10s', topic: 'catalog.retry.10s', lag: '2000' }
  { name: 'retry-1m', topic: 'catalog.retry.1m', lag: '2000' }
  { name: 'retry-10m', topic: 'catalog.retry.10m', lag: '2000' }
]

resource embedder 'Microsoft.App/containerApps@2025-01-01' = {
  name: 'embedder'
  location: location
  identity: identities
  dependsOn: [hubs, mayPull, mayReadSecrets, mayKeepPictures]
  properties: {
    environmentId: environment.id
    workloadProfileName: 'Consumption'
    configuration: {
      registries: pulled
      secrets: secrets
    }
    template: {
      terminationGracePeriodSeconds: 75
      containers: [
        {
          name: 'embedder'
          image: '${images.properties.loginServer}/catalens-embedder:${release}'
          env: concat(shared, [
            { name: 'CATALENS_ALLOW_ANONYMOUS', value: 'true' } // probes and metrics are all it serves, and no ingress
            { name: 'CATALENS_ENCODER__LANES', value: '2' }
          ])
          resources: { cpu: json('2.0'), memory: '4Gi' }
          probes: probes
          volumeMounts: mounts
        }
      ]
      volumes: volumes
      scale: {
        minReplicas: 0
        maxReplicas: min(partitions, 10)
        pollingInterval: 15
        cooldownPeriod: 600
        rules: [
          for one in consumed: {
            name: one.name
            custom: {
              type: 'kafka'
              metadata: {
                bootstrapServersFromEnv: 'CATALENS_KAFKA__BOOTSTRAP_SERVERS'
                consumerGroup: group
                topic: one.topic
                lagThreshold: one.lag
                activationLagThreshold: '0'
                offsetResetPolicy: 'earliest'
                excludePersistentLag: 'true'
                ensureEvenDistributionOfPartitions: 'true'
                sasl: 'plaintext'
                tls: 'enable'
              }
              auth: [
                { secretRef: 'kafka-user', triggerParameter: 'username' }
                { secretRef: 'kafka-connection', triggerParameter: 'password' }
              ]
            }
          }
        ]
      }
    }
  }
}

// The command line beside the engines, started by hand: another model, an index made anew.
resource tool 'Microsoft.App/jobs@2025-01-01' = {
  name: 'catalens'
  location: location
  identity: identities
  dependsOn: [hubs, mayPull, mayReadSecrets, mayKeepPictures]
  properties: {
    environmentId: environment.id
    workloadProfileName: 'Consumption'
    configuration: {
      triggerType: 'Manual'
      manualTriggerConfig: { parallelism: 1, replicaCompletionCount: 1 }
      replicaTimeout: 86400
      replicaRetryLimit: 3 // a reindex goes on where it was
      registries: pulled
      secrets: secrets
    }
    template: {
      containers: [
        {
          name: 'catalens'
          image: '${images.properties.loginServer}/catalens-standalone:${release}'
          args: command
          env: concat(shared, [{ name: 'CATALENS_ENCODER__LANES', value: '2' }])
          resources: { cpu: json('2.0'), memory: '4Gi' }
          volumeMounts: mounts
        }
      ]
      volumes: volumes
    }
  }
}

output ingestUrl string = 'https://${ingest.properties.configuration.ingress.fqdn}'
output queryUrl string = 'https://${query.properties.configuration.ingress.fqdn}'
output modelShare string = '${storage.name}/models'
